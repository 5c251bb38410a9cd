"""Figures from arrays and frames; nothing here knows a model, a data set or torch.

Each function takes finished numbers and returns a matplotlib Figure; `write_figure` turns it into
PNG and SVG whose bytes depend on the numbers alone (no dates, no user settings, a fixed salt).
Images are [n, C, H, W] in [0, 1], grey (C = 1) or RGB (C = 3). Every text is drawn as it is: a
class may be called ``$x_$``, which as mathematics would end the drawing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar
from xml.sax.saxutils import escape, quoteattr

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from PIL import Image, ImageChops, ImageStat
from PIL.PngImagePlugin import PngInfo

from dsvlib._files import atomic_path

# Distinct under the common colour-vision deficiencies; each has a contrast of at least 3 on white.
COLORS = ("#0072b2", "#d55e00", "#00876c", "#8a2f7d", "#a87700", "#5b5b5b", "#2b2d84", "#c7447c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)))
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "++")
INK, FAINT, WRONG = "#262626", "#c8c8c8", COLORS[1]
DPI = 160
WIDEST = 9  # inches of a plot: in a wider one letters are too small on a phone
SMALLEST = 0.7  # of a text's usual size
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a number readable on a line

P = ParamSpec("P")
T = TypeVar("T")


@cache
def _style() -> Any:  # a dict; matplotlib's stubs want the literal name of each setting
    import seaborn as sns

    return {
        **sns.axes_style("whitegrid"),
        **sns.plotting_context("notebook"),
        "axes.prop_cycle": mpl.cycler(color=COLORS),  # type: ignore[attr-defined]
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#7f7f7f",
        "grid.color": "#e6e6e6",
        "text.usetex": False,
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so it exists everywhere
        "legend.frameon": False,
        "legend.fontsize": 10,
        "image.composite_image": False,  # in SVG each picture keeps its own crisp pixels
        "svg.fonttype": "path",
        "svg.hashsalt": "dsvlib",
        "savefig.facecolor": "white",
    }


def _plain(text: object) -> str:
    """Return a text in which ``$`` stands for itself, in matplotlib's way of writing it."""
    return str(text).replace("$", r"\$")


def use_style() -> None:
    """Give one's own matplotlib figures the look of ours."""
    mpl.rcParams.update(_style())


def _styled(function: Callable[P, T]) -> Callable[P, T]:
    """Draw in our style whatever the caller's settings: same numbers, same bytes."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with mpl.rc_context(_style()):
            return function(*args, **kwargs)

    return inside


def raise_contrast(images: np.ndarray, *, share: float = 0.01) -> np.ndarray:
    """Return images [n, C, H, W] in [0, 1], each stretched until `share` of it clips at each end.

    One stretch for all channels of an image, so that grey stays grey. The papers show theirs so.
    """
    pixels = _check_images(images).transpose(0, 3, 1, 2)
    low, high = (
        np.quantile(pixels, end, axis=(1, 2, 3), keepdims=True) for end in (share, 1 - share)
    )
    return np.clip((pixels - low) / np.maximum(high - low, 1e-6), 0, 1)


def write_animation(
    frames: Sequence[np.ndarray], path: Path | str, *, alt: str, milliseconds: int = 120
) -> Path:
    """Write pictures of one size [H, W, 3] in [0, 1] as an animated PNG that runs for ever.

    The last one stands for two seconds.
    """
    drawn = ((np.asarray(frame) * 255).round().astype(np.uint8) for frame in frames)
    pictures = [_in_few_colours(Image.fromarray(frame)).convert("RGB") for frame in drawn]
    about = PngInfo()
    about.add_itxt("Description", alt)
    times = [milliseconds] * (len(pictures) - 1) + [2000]
    path = Path(path)
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary, "png", save_all=True, append_images=pictures[1:], duration=times, loop=0,
            optimize=True, pnginfo=about,
        )  # fmt: skip
    return path


@_styled
def write_figure(
    fig: Figure,
    stem: Path | str,
    *,
    alt: str,
    badge: str = "",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``<stem>.png`` and ``<stem>.svg``, each whole or not at all; return their paths.

    The PNG is what is committed and shown. `alt` goes into both files, `badge` (the scale of the
    run) below the lower right corner, where the picture grows to make room, so that it cannot cover
    a label.
    """
    stem = Path(stem)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    fig.set_dpi(DPI)
    label = _draw_badge(fig, badge)
    png, svg = io.BytesIO(), io.BytesIO()
    try:
        box = fig.get_tightbbox().padded(0.08)
        about = dict(metadata or {})
        fig.savefig(png, format="png", dpi=DPI, bbox_inches=box)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        fig.savefig(svg, format="svg", bbox_inches=box, metadata=about | nothing)
    finally:
        label.remove()
    head, rest = svg.getvalue().decode().split("<svg ", 1)
    opening, body = rest.split(">", 1)
    described = f'{head}<svg role="img" aria-label={quoteattr(alt)} {opening}>'
    described += f"\n <title>{escape(stem.name)}</title>\n <desc>{escape(alt)}</desc>{body}"
    small = compact(png.getvalue(), about | {"Description": alt})
    for path, content in zip(paths, (small, described.encode()), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return paths


def compact(png: bytes, text: Mapping[str, str]) -> bytes:
    """Return a PNG in few colours, optimised, with `text` in it; equal bytes on every call."""
    about = PngInfo()
    for name, value in text.items():
        about.add_itxt(name, value)
    small = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        few = _in_few_colours(picture.convert("RGB"))
    few.save(small, "png", optimize=True, dpi=(DPI, DPI), pnginfo=about)
    return small.getvalue()


def _in_few_colours(picture: Image.Image) -> Image.Image:
    """Return an RGB picture in 64 or 256 colours, where levels change by at most 2 of 255 (RMS).

    And by more than 16 in one pixel of ten thousand at most: median cut merges rare colours, as at
    the end of a colour bar, and maximum coverage keeps them. Photographs have more colours: they
    are left 64 levels in each channel, which nobody sees, since a palette would turn a sky into
    bands. (Dithered, as `less_wide` does for the largest, a palette shows grain.)
    """
    ways = Image.Quantize
    for colors, method in (64, ways.MEDIANCUT), (256, ways.MEDIANCUT), (256, ways.MAXCOVERAGE):
        few = picture.quantize(colors, method=method, dither=Image.Dither.NONE)
        change = ImageChops.difference(picture, few.convert("RGB"))
        far = (np.asarray(change) > 16).any(axis=2).mean()
        if max(ImageStat.Stat(change).rms) <= 2 and far <= 1e-4:
            return few
    return picture.point([round(round(level / 255 * 63) * 255 / 63) for level in range(256)] * 3)


def _draw_badge(fig: Figure, badge: str) -> Any:
    """Draw the badge under everything else and return it, for removal."""
    fig.draw_without_rendering()  # lays the axes out, so that the extent below is the final one
    fig.set_layout_engine("none")  # each further layout would drift by a fraction of a pixel
    box = fig.get_tightbbox()
    warning = "not a result" in badge
    return fig.text(
        box.x1 / fig.get_figwidth(),
        (box.y0 - 0.12) / fig.get_figheight(),
        _plain(badge),
        ha="right",
        va="top",
        fontsize=8,
        color="#6b3f00" if warning else "#4d4d4d",
        bbox={
            "boxstyle": "round,pad=0.35",
            "facecolor": "#ffe3b0" if warning else "#efefef",
            "edgecolor": "none",
        }
        if badge
        else None,
    )


@_styled
def image_grid(
    images: np.ndarray,
    *,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    correct: Sequence[bool] | None = None,
    title: str | None = None,
    tile: float = 0.8,
    smooth: bool = False,
) -> Figure:
    """Draw images [n, C, H, W] row by row, `columns` in a row (default: up to 10).

    `captions` stand below the images, broken into lines that stay within their own; where
    `correct` is False, caption and frame turn red-orange and the caption gets a cross. `tile` is
    the width of one image in inches; `smooth` draws between the pixels, as a camera would, where
    their edges would be read instead of the picture.
    Raises ValueError for a wrong shape, pixels outside [0, 1] or labels of another number.
    """
    pixels = _check_images(images)
    n, height, width = pixels.shape[:3]
    columns = columns or (len(column_labels) if column_labels else min(n, 10))
    rows = -(-n // columns)
    for name, given, wanted in (
        ("row_labels", row_labels, rows),
        ("column_labels", column_labels, columns),
        ("captions", captions, n),
        ("correct", correct, n),
    ):
        if given is not None and len(given) != wanted:
            raise ValueError(f"{name}: expected {wanted} for this grid, got {len(given)}")
    tall = height / width
    good = [correct is None or bool(correct[i]) for i in range(n)]
    texts = [text if ok else f"✗ {text}" for text, ok in zip(captions or (), good, strict=False)]
    texts, text_size = _fit(texts, tile, 8)
    heads, head_size = _fit(column_labels or (), tile, 10)
    lines = [len(text.splitlines()) for text in texts] or [0] * n
    gaps = [max(lines[row * columns : (row + 1) * columns]) for row in range(rows)]
    across, steps = 1.08, [tall + 0.08 + (0.03 + 0.14 * gap / tile) * (gap > 0) for gap in gaps]
    tops = [sum(steps[:row]) for row in range(rows)]
    fig = Figure(figsize=(tile * across * columns, tile * sum(steps)), dpi=DPI)
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, across * columns), ylim=(sum(steps), 0))
    axes.axis("off")
    for i, picture in enumerate(pixels):
        x, y = i % columns * across + 0.04, tops[i // columns] + 0.04
        _draw_image(axes, picture, (x, x + 1, y + tall, y), good[i], smooth)
        if texts:
            color = INK if good[i] else WRONG
            _say(axes, x + 0.5, y + tall + 0.05, texts[i], va="top", size=text_size, color=color)
    for row, text in enumerate(row_labels or ()):
        _say(axes, -0.06, tops[row] + 0.04 + tall / 2, text, ha="right", size=10)
    for column, text in enumerate(heads):
        _say(axes, column * across + 0.54, -0.05, text, va="bottom", size=head_size)
    if title:
        lift = 0.1 + max((0.06 + 0.17 * (1 + text.count("\n")) for text in heads), default=0)
        (title,), size = _fit((title,), 0.92 * tile * across * columns, 13)  # bold is wider
        _say(axes, 0.04, -lift / tile, title, ha="left", va="bottom", size=size, weight="bold")
    return fig


@cache
def _inches(text: str, size: float) -> float:
    return float(TextPath((0, 0), text, size=size).get_extents().width) / 72


def _fit(texts: Iterable[str], width: float, size: float) -> tuple[list[str], float]:
    """Return the texts broken at spaces to `width` inches, and a size at which all fit.

    Only a single word that is too long makes all of them smaller, down to what can be read; one
    that is longer still is broken.
    """

    def inches(text: str) -> float:
        return _inches(_plain(text), size)

    def pieces(word: str) -> Iterator[str]:
        while inches(word) > width / SMALLEST and len(word) > 1:
            end = next(k for k in range(len(word) - 1, 0, -1)
                       if k == 1 or inches(word[:k]) <= width / SMALLEST)  # fmt: skip
            yield word[:end]
            word = word[end:]
        yield word

    def broken(line: str) -> Iterator[str]:
        start = ""
        for word in (piece for whole in line.split() for piece in pieces(whole)):
            if start and inches(f"{start} {word}") > width:
                yield start
                start = word
            else:
                start = f"{start} {word}".strip()
        yield start

    fitted = [[part for line in text.split("\n") for part in broken(line)] for text in texts]
    widest = max((inches(line) for lines in fitted for line in lines if line), default=width)
    smaller = min(1.0, max(width / widest, SMALLEST))
    return ["\n".join(lines) for lines in fitted], size * smaller


def _draw_image(
    axes: Axes,
    picture: np.ndarray,
    extent: tuple[float, float, float, float],
    right: bool,
    smooth: bool = False,
) -> None:
    grey = picture.shape[2] == 1
    axes.imshow(
        picture[:, :, 0] if grey else picture,
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=extent,
        interpolation="bicubic" if smooth else "none",  # crisp pixels, in SVG as well
        aspect="auto",
        clip_on=False,
    )
    left, edge, bottom, top = extent
    outline = ([left, edge, edge, left, left], [top, top, bottom, bottom, top])
    axes.plot(*outline, color=FAINT if right else WRONG, lw=0.6 if right else 1.8, clip_on=False)


def _say(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    defaults: dict[str, Any] = {"ha": "center", "va": "center", "size": 8, "color": INK}
    axes.text(x, y, _plain(text), **(defaults | options))


def _check_images(images: np.ndarray) -> np.ndarray:
    """Return the images as [n, H, W, C]."""
    array = np.asarray(images, dtype=float)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"images: expected shape [n, 1 or 3, H, W], got {list(array.shape)}")
    low, high = array.min(), array.max()
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # also false for NaN
        raise ValueError(
            f"images: expected pixels in [0, 1], got [{low:.3g}, {high:.3g}]; denormalise them"
        )
    return array.clip(0, 1).transpose(0, 2, 3, 1)


@_styled
def curve(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None = None,
    *,
    panel: str | None = None,
    band: tuple[str, str] | None = None,
    reference: Mapping[str, float] | None = None,
    title: str | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
    log_x: bool = False,
    size: tuple[float, float] = (7, 4.2),
) -> Figure:
    """Draw `y` over `x`, one line per `hue`, with a band; side by side for each value of `panel`.

    The band is between the columns `band`, or one standard deviation of rows that share `x` and
    `hue` (seeds). `reference` draws named horizontal lines, such as chance or the paper's number.
    """
    _check_columns(frame, x, y, hue, panel, *(band or ()))
    fig, panels = _panels(frame, panel, hue, size, sharey=True)
    for number, (axes, name, _, groups) in enumerate(panels):
        for i, of, part in groups:
            points = _summary(part, x, y)
            at = points[x].to_numpy()
            mean, spread = (points[k].to_numpy(float) for k in ("mean", "spread"))
            low, high = (part[end] for end in band) if band else (mean - spread, mean + spread)
            look: dict[str, Any] = {"color": COLORS[i % 8], "ls": LINES[i % 8]}
            # a marker on every one of 600 steps is a smear
            look |= {"marker": MARKERS[i % 8], "markevery": max(1, len(at) // 12)}
            axes.plot(at, mean, label=_plain(of), **look)
            if band or np.any(spread > 0):
                axes.fill_between(at, low, high, color=COLORS[i % 8], alpha=0.18, lw=0)
        axes.set_xscale("log" if log_x else "linear")
        up = "" if number else y_label or y
        _finish(axes, reference, name or title, "" if panel else x_label or x, up)
    return _with_legend(fig, hue, below=x_label or x if panel else "")


@_styled
def scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None = None,
    *,
    names: str | None = None,
    interval: tuple[str, str] | None = None,
    lines: tuple[float, float] = (0, 0),
    title: str | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
    size: tuple[float, float] = (7.6, 4.8),
) -> Figure:
    """Draw a point per row, in colour and shape of its `hue`, and the two `lines` x and y.

    The column `names` holds what is written at a point, an empty text for nothing; the columns
    `interval` hold the ends of a bar through it.
    """
    _check_columns(frame, x, y, hue, names, *(interval or ()))
    fig, ((axes, _, _, groups),) = _panels(frame, None, hue, size)
    for i, name, part in groups:
        at, up = part[x].to_numpy(float), part[y].to_numpy(float)
        bars = None
        if interval:
            low, high = (part[end].to_numpy(float) for end in interval)
            # rounding puts a share of 1 outside its own
            bars = np.maximum([up - low, high - up], 0)
        _dots(axes, i, name, at, up, yerr=bars)
    spots = zip(frame[names], frame[x], frame[y], strict=True) if names else ()
    written = sorted((spot for spot in spots if spot[0]), key=lambda spot: spot[1])
    for k, (text, at, up) in enumerate(written):  # above and below in turn
        axes.annotate(_plain(text), (at, up), (0, -14 if k % 2 else 8),
                      textcoords="offset points", ha="center", size=8)  # fmt: skip
    axes.axvline(lines[0], color=INK, lw=0.9, ls="--", zorder=1.5)
    axes.axhline(lines[1], color=INK, lw=0.9, ls=":", zorder=1.5)
    axes.margins(0.12)
    _finish(axes, None, title, x_label or x, y_label or y)
    return _with_legend(fig, hue)


@_styled
def bar_with_error(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None = None,
    *,
    reference: Mapping[str, float] | None = None,
    number: str = "{:.3g}",
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
    size: tuple[float, float] = (7, 4.2),
) -> Figure:
    """Draw one bar of `y` per `x` and `hue` with its standard deviation and its number.

    Deviation and references as in `curve`; the categories keep the order of the frame. `limits`
    are those of the y axis.
    """
    _check_columns(frame, x, y, hue)
    fig, ((axes, _, _, groups),) = _panels(frame, None, hue, size)
    order = list(dict.fromkeys(frame[x]))
    width, room = 0.8 / len(groups), (fig.get_figwidth() - 1.2) / len(order)
    for i, name, part in groups:
        points = _summary(part, x, y).set_index(x).reindex(order)
        at = np.arange(len(order)) + (i - (len(groups) - 1) / 2) * width
        mean, spread = points["mean"].to_numpy(float), points["spread"].to_numpy(float)
        hatch = HATCHES[i % 8] if len(groups) > 1 else ""
        axes.bar(
            at,
            mean,
            width * 0.92,
            color=COLORS[i % 8],
            label=_plain(name),
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
        whiskers = spread > 0
        axes.errorbar(at[whiskers], mean[whiskers], spread[whiskers], fmt="none", ecolor=INK,
                      elinewidth=1.3, capsize=4)  # fmt: skip
        tops = mean + np.where(whiskers, spread, 0)
        said = [number.format(value) if np.isfinite(value) else "" for value in mean]
        fitting = 9 * min(1, max(SMALLEST, room * width / max(_inches(t, 10) for t in said)))
        ends = mean - np.where(whiskers, spread, 0)
        for place, value, top, end, text in zip(at, mean, tops, ends, said, strict=True):
            below = value < 0  # the number stands at the end of its bar
            axes.annotate(text.replace("-", "−"), (place, min(end, 0) if below else max(top, 0)),
                          (0, -3 if below else 3), textcoords="offset points", ha="center",
                          va="top" if below else "bottom", size=fitting,
                          path_effects=HALO)  # fmt: skip
    names, name_size = _fit(map(str, order), 0.85 * room, 11)
    axes.set_xticks(range(len(order)), [_plain(name) for name in names], size=name_size)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    if limits:
        axes.set_ylim(*limits)
    _finish(axes, reference, title, x_label or "", y_label or y)
    return _with_legend(fig, hue)


@_styled
def dots_with_error(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    panel: str | None = None,
    reference: Mapping[str, float] | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
    size: tuple[float, float] = (7, 4.2),
) -> Figure:
    """Draw one marker of `y` per `x` and `hue`, side by side, with its standard deviation.

    Deviation and references as in `curve`; categories keep the order of the frame. Each value of
    the column `panel` has a panel of its own, below the one before.
    """
    _check_columns(frame, x, y, hue, panel)
    order = list(dict.fromkeys(frame[x]))
    fig, panels = _panels(frame, panel, hue, size, down=True)
    for axes, title, _, groups in panels:
        for i, name, part in groups:
            points = _summary(part, x, y).set_index(x).reindex(order)
            at = np.arange(len(order)) + 0.8 * ((i + 0.5) / len(groups) - 0.5)
            spread = points["spread"].where(points["spread"] > 0)
            _dots(axes, i, name, at, points["mean"], yerr=spread)
        axes.set_xticks(range(len(order)), [_plain(name) for name in order], size=10)
        axes.set(xlim=(-0.5, len(order) - 0.5), ylim=(0, None))
        axes.grid(visible=False, axis="x")
        for edge in range(1, len(order)):
            axes.axvline(edge - 0.5, color=FAINT, lw=0.8, zorder=0)
        _finish(axes, reference, title, x_label or "", y_label or y)
    return _with_legend(fig, hue)


@_styled
def intervals(
    frame: pd.DataFrame,
    label: str,
    *,
    hue: str | None = None,
    panel: str | None = None,
    x_label: str = "difference",
    size: tuple[float, float] = (7, 4.2),
) -> Figure:
    """Draw each row's ``gain`` with its interval from ``low`` to ``high``, from top to bottom.

    Each value of the column `panel` has a panel of its own, beside the one before, and rows are
    named once where they are the same in all. Where an interval is far wider than all gains, its
    ends are cut off; NaN is no interval.
    """
    _check_columns(frame, label, "gain", "low", "high", hue, panel)
    frame = frame.assign(at=frame.groupby(panel or (lambda _: 0)).cumcount())
    same = panel is None or len(set(frame.groupby(panel)[label].agg(tuple))) == 1
    fig, panels = _panels(frame, panel, hue, size, sharey=same)
    for number, (axes, title, part, groups) in enumerate(panels):
        for i, name, rows in groups:
            ends = [rows["gain"] - rows["low"], rows["high"] - rows["gain"]]
            _dots(axes, i, name, rows["gain"], rows["at"], xerr=ends)
        axes.axvline(0, color=INK, lw=1.2)
        if not (same and number):
            axes.set_yticks(part["at"], [_plain(text) for text in part[label]], size=10)
        most = 2 * float(part["gain"].abs().max()) + 1
        left, right = min(part["low"].min(), 0), max(part["high"].max(), 0)
        axes.set_xlim(max(1.1 * left, -most), min(1.1 * right, most))
        axes.set_ylim(len(part) - 0.5, -0.5)
        _finish(axes, None, title, "" if panel else x_label, "")
    return _with_legend(fig, hue, below=x_label if panel else "")


class _Panel(NamedTuple):
    axes: Axes
    name: str
    rows: pd.DataFrame
    groups: list[tuple[int, str, pd.DataFrame]]  # a hue's number, name and rows


def _panels(
    frame: pd.DataFrame,
    panel: str | None,
    hue: str | None,
    size: tuple[float, float],
    *,
    down: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[_Panel]]:
    """Return a figure with axes for each value of `panel`, side by side or down the page.

    A hue has the same number, which chooses its colour and marker, in all of them; of a categorical
    column it is that of the category, so that it is the same in every figure.
    """
    hues, parts = [name for name, _ in _groups(frame, hue)], _groups(frame, panel)
    numbers = list(map(str, frame[hue].cat.categories)) if hasattr(frame.get(hue), "cat") else hues
    # A Figure apart from pyplot: no global state, nothing to close, no second display.
    fig = Figure(figsize=(min(size[0], WIDEST), size[1]), dpi=DPI, layout="constrained")
    grid = (len(parts), 1) if down else (1, len(parts))
    places = fig.subplots(*grid, sharey=sharey, squeeze=False).flatten()
    panels = []
    for axes, (name, rows) in zip(places, parts, strict=True):
        own = dict(_groups(rows, hue))
        groups = [(i, one, own.get(one, rows[:0])) for i, one in enumerate(numbers) if one in hues]
        panels.append(_Panel(axes, name, rows, groups))
    return fig, panels


def _dots(axes: Axes, i: int, name: str, x: Any, y: Any, **bars: Any) -> None:
    """Draw the points of the hue with number `i`, hollow ones from the ninth on."""
    look: dict[str, Any] = {"fmt": MARKERS[i % 8], "color": COLORS[i % 8], "ms": 8, "capsize": 3}
    axes.errorbar(x, y, **bars, **look, mfc=None if i < 8 else "white", label=_plain(name))


def _with_legend(fig: Figure, hue: str | None, *, below: str = "") -> Figure:
    """Say below the axes, where it can hide no data, what all of them show and colours mean."""
    size = mpl.rcParams["axes.labelsize"]
    if not hue:
        if below:
            fig.supxlabel(_plain(below), size=size)
        return fig
    handles, names = fig.axes[0].get_legend_handles_labels()
    widest = 0.8 + max(_inches(name, 10) for name in names)
    columns = max(1, min(4, len(names), int(fig.get_figwidth() / widest)))
    # the label is the legend's title: a label of the figure would be drawn over it
    heading = {"title": _plain(below), "title_fontsize": size} if below else {}
    fig.legend(handles, names, loc="outside lower center", ncols=columns, **heading)
    return fig


def _check_columns(frame: pd.DataFrame, *names: str | None) -> None:
    missing = [name for name in names if name is not None and name not in frame.columns]
    if missing or frame.empty:
        raise ValueError(
            f"frame: expected rows and the columns {missing}, got columns {list(frame.columns)}"
        )


def _groups(frame: pd.DataFrame, hue: str | None) -> list[tuple[str, pd.DataFrame]]:
    if hue is None:
        return [("", frame)]
    return [(str(name), part) for name, part in frame.groupby(hue, sort=False, observed=True)]


def _summary(part: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Return x, mean and spread: the deviation over rows that share x."""
    grouped = part.groupby(x, sort=False, observed=True)[y]
    spread = grouped.std(ddof=1).fillna(0.0)
    return pd.DataFrame({"mean": grouped.mean(), "spread": spread}).reset_index()


def _finish(
    axes: Axes,
    reference: Mapping[str, float] | None,
    title: str | None,
    x_label: str,
    y_label: str,
) -> None:
    for name, level in (reference or {}).items():
        axes.axhline(level, color="#5b5b5b", lw=1.2, ls=(0, (4, 2)), zorder=1.5)
        axes.annotate(_plain(name), (1, level), (4, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", size=9, color="#4d4d4d")  # fmt: skip
    axes.set(xlabel=_plain(x_label), ylabel=_plain(y_label))
    axes.set_axisbelow(True)
    if title:
        axes.set_title(_plain(title), loc="left", weight="bold", size=13, pad=8)


def draw_regions(axes: Axes, scores: np.ndarray, box: float) -> None:
    """Shade the square |x| ≤ `box` by the class with the largest score, boundaries as lines.

    `scores` [side, side, K] holds the scores at the points of an even grid, first index x₁; with
    K = 1 it is a binary score, positive for class 1.
    """
    values = np.asarray(scores, dtype=float)
    if values.ndim != 3 or not values.size:
        raise ValueError(f"scores: expected shape [side, side, K], got {list(values.shape)}")
    if values.shape[2] == 1:
        values = np.concatenate([-values, values], axis=2)
    ticks = np.linspace(-box, box, len(values))
    for k in range(values.shape[2]):
        lead = values[:, :, k] - np.delete(values, k, axis=2).max(axis=2)
        if lead.max() > 0:
            axes.contourf(ticks, ticks, lead.T, levels=[0, lead.max() * 1.001],
                          colors=[COLORS[k]], alpha=0.1)  # fmt: skip
        if lead.min() < 0 < lead.max():
            axes.contour(ticks, ticks, lead.T, levels=[0], colors=[INK], linewidths=1.4)
    axes.set(xlim=(-box, box), ylim=(-box, box), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    axes.grid(visible=False)


def draw_points(
    axes: Axes,
    inputs: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    largest: float | None = None,
    area: float = 420,
) -> None:
    """Draw points [n, 2] in their class's colour and marker, larger ones with area ∝ `weights` [n].

    A weight of `largest` (default: the largest there is) has `area` points squared; one above zero
    can always be seen.
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    sizes = np.zeros(len(inputs))
    if weights is not None:
        weights = np.asarray(weights, dtype=float)
        if weights.shape != sizes.shape:
            raise ValueError(
                f"weights: expected one per point, [{len(inputs)}], got {list(weights.shape)}"
            )
        top = float(largest or weights.max() or 1)
        sizes = np.where(weights > 1e-6 * top, np.maximum(area * weights / top, 4), 0)
    for k in np.unique(labels):
        style: dict[str, Any] = {"color": COLORS[k], "marker": MARKERS[k]}
        x1, x2 = inputs[labels == k].T
        axes.scatter(x1, x2, s=13, alpha=0.45, lw=0, **style)
        at = (labels == k) & (sizes > 0)
        x1, x2 = inputs[at].T
        axes.scatter(x1, x2, s=sizes[at], alpha=0.65, ec=INK, lw=0.7, zorder=3, **style)
