"""Figures: the same numbers give the same bytes, and every picture can be read without eyes."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from companion import figures

ALT = "Three of four digits are <recognised> & one is not; λ falls"
FRAME = pd.DataFrame(
    {
        "step": [0, 1, 2] * 4,
        "loss": np.linspace(1, 0.1, 12),
        "method": ["full"] * 6 + ["half"] * 6,
        "sd": [0.1] * 12,
    }
)
GAINS = pd.DataFrame(
    {
        "rival": ["a", "b", "c", "d"],
        "size": [1, 1, 10, 10],
        "gain": [2.0, -1.0, 0.0, 1.0],
        "low": [1.0, -2.0, np.nan, -500.0],
        "high": [3.0, 0.5, np.nan, 502.0],
        "finding": ["better", "open", "open", "open"],
    }
)
IMAGES = np.linspace(0, 1, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5)

DRAWINGS: dict[str, Callable[[], Figure]] = {
    "grid": lambda: figures.image_grid(
        IMAGES, columns=2, captions=list("abcd"), correct=[True, True, False, True], title="Four"
    ),
    "grey": lambda: figures.image_grid(IMAGES[:, :1], row_labels=["x"], column_labels=list("abcd")),
    "curve": lambda: figures.curve(FRAME, "step", "loss", "method", reference={"chance": 0.5}),
    "bar": lambda: figures.bar_with_error(FRAME, "step", "loss", "method", title="T"),
    "dots": lambda: figures.dots_with_error(FRAME, "step", "loss", "method", panel="sd"),
    "intervals": lambda: figures.intervals(GAINS, "rival", hue="finding", panel="size"),
    "panels": lambda: figures.curve(
        FRAME[:3].assign(low=0, high=1, of="a $"),
        "step",
        "loss",
        "of",
        panel="of",
        band=("low", "high"),
    ),
    "scatter": lambda: figures.scatter(
        FRAME.assign(said=FRAME["method"]),
        "step",
        "loss",
        "method",
        names="said",
        interval=("loss", "loss"),
        lines=(1, 0.5),
    ),
}


def write(fig: Figure, stem: Path, badge: str = "digits · quick") -> tuple[bytes, bytes]:
    png, svg = figures.write_figure(fig, stem, alt=ALT, badge=badge, metadata={"Source": "n"})
    return png.read_bytes(), svg.read_bytes()


@pytest.mark.parametrize("name", DRAWINGS)
def test_same_numbers_same_bytes_whatever_the_users_settings(name: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = write(DRAWINGS[name](), tmp_path / name)
    with mpl.rc_context({"font.size": 30, "svg.hashsalt": "other", "axes.grid": False}):
        fig = DRAWINGS[name]()
        assert write(fig, tmp_path / "other" / name) == first
    assert write(fig, tmp_path / "other" / name) == first, "writing must not change the figure"


def test_alt_text_is_in_both_files_and_no_date(tmp_path: Path) -> None:
    _, svg = write(DRAWINGS["curve"](), tmp_path / "curve")
    with Image.open(tmp_path / "curve.png") as png:
        assert png.text["Description"] == ALT  # type: ignore[attr-defined]
        assert png.text["Source"] == "n"  # type: ignore[attr-defined]
        assert "Software" not in png.text  # type: ignore[attr-defined]
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == ALT
    assert root.findtext("{http://www.w3.org/2000/svg}desc") == ALT
    assert b"<dc:date>" not in svg


@pytest.mark.parametrize("name", DRAWINGS)
def test_badge_touches_nothing(name: str) -> None:
    fig = DRAWINGS[name]()
    fig.draw_without_rendering()
    below = fig.get_tightbbox().y0 * fig.dpi
    badge = figures._draw_badge(fig, "smoke run · not a result")
    assert badge.get_window_extent().y1 < below


def test_pictures_are_small_and_keep_the_colours_of_marks(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((40, 3, 16, 16))
    drawn = {
        "grid": figures.image_grid(noise, correct=[index > 0 for index in range(40)]),
        "curve": DRAWINGS["curve"](),
    }
    for name, fig in drawn.items():
        png, _ = write(fig, tmp_path / name)
        assert len(png) < 200_000
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.mode == {"grid": "RGB", "curve": "P"}[name]
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        for color, far in (("white", 0), (figures.COLORS[1], 2)):
            wanted = np.round(255 * np.array(mpl.colors.to_rgb(color)))
            assert np.abs(pixels - wanted).max(axis=1).min() <= far, (name, color)


def test_a_sky_has_no_bands_wider_than_can_be_seen() -> None:
    """Of photographs with many colours no level moves by more than 2, no step grows beyond 5."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 256, 3), dtype=np.uint8)
    picture[32:] = np.arange(256, dtype=np.uint8)[None, :, None]
    seen = np.asarray(figures._in_few_colours(Image.fromarray(picture)).convert("RGB")).astype(int)
    assert np.abs(seen - picture).max() <= 2
    assert np.diff(seen[40, :, 0]).max() <= 5


@pytest.mark.parametrize(
    "word", ["$x_$", "a$b", "$\\alpha$", r"\frac{$", "{}%_^", "<b>&\n$1 to $2"]
)
def test_every_text_is_drawn_as_it_is(word: str, tmp_path: Path) -> None:
    """A class, title, legend or badge may be called anything; none of it is mathematics."""
    options = {"title": word, "x_label": word, "y_label": word, "reference": {word: 0.5}}
    frame = FRAME.assign(method=word, step=word)
    drawn = {
        "grid": figures.image_grid(
            IMAGES, row_labels=[word], column_labels=[word] * 4, captions=[word] * 4, title=word
        ),
        "curve": figures.curve(FRAME.assign(method=word), "step", "loss", "method", **options),
        "bar": figures.bar_with_error(frame, "step", "loss", "method", **options),
    }
    shown = word.replace("\n", " ")
    for name, fig in drawn.items():
        fig.draw_without_rendering()
        texts = [text._preprocess_math(text.get_text()) for text in fig.findobj(Text)]
        texts = [(" ".join(text.split()), math) for text, math in texts]
        assert sum(text == shown for text, _ in texts) >= 5, name
        assert not any(math for text, math in texts if text == shown)
        write(fig, tmp_path / name, badge=word)


def test_image_grid_keeps_the_pixels(tmp_path: Path) -> None:
    black_and_white = np.zeros((1, 1, 2, 2))
    black_and_white[0, 0, 0, 1] = 1
    write(figures.image_grid(black_and_white, tile=2), tmp_path / "pixels", badge="")
    with Image.open(tmp_path / "pixels.png") as png:
        levels = np.asarray(png.convert("L"))
    height, width = levels.shape
    quarter = [levels[height * i // 4, width * j // 4] for i in (1, 3) for j in (1, 3)]
    assert quarter == [0, 255, 0, 0]
    assert np.isin(levels, (0, 255)).mean() > 0.9, "nearest interpolation leaves no grey"


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((2, 8, 8)), {}, "shape"),
        (np.zeros((2, 8, 8, 3)), {}, "shape"),
        (np.full((1, 1, 2, 2), 1.5), {}, "denormalise"),
        (np.full((1, 1, 2, 2), np.nan), {}, r"\[0, 1\]"),
        (np.zeros((4, 1, 2, 2)), {"captions": ["a"]}, "captions: expected 4"),
        (np.zeros((4, 1, 2, 2)), {"columns": 2, "row_labels": ["a"]}, "row_labels: expected 2"),
    ],
)
def test_image_grid_refuses(images: np.ndarray, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.image_grid(images, **options)  # type: ignore[arg-type]


def test_plots_refuse_missing_columns() -> None:
    with pytest.raises(ValueError, match=r"columns \['los'\]"):
        figures.curve(FRAME, "step", "los")
    with pytest.raises(ValueError, match="expected rows"):
        figures.bar_with_error(FRAME.iloc[:0], "step", "loss")


def test_curve_bands_are_the_deviation_over_repetitions() -> None:
    frame = pd.DataFrame({"x": [0, 0, 1, 1], "y": [1.0, 3.0, 2.0, 2.0]})
    summary = figures._summary(frame, "x", "y")
    assert summary["mean"].tolist() == [2.0, 2.0]
    assert summary["spread"].tolist() == pytest.approx([2**0.5, 0.0])


def test_dots_stand_side_by_side_with_their_deviation() -> None:
    fig = figures.dots_with_error(FRAME, "step", "loss", "method", reference={"chance": 0.5})
    (axes,) = fig.axes
    dots = [line for line in axes.lines if line.get_marker() in figures.MARKERS[:2]]
    first, second = (np.asarray(line.get_xdata(), float) for line in dots)
    assert np.allclose(second - first, 0.4)
    means = FRAME.groupby(["method", "step"])["loss"].mean()
    assert np.allclose(dots[0].get_ydata(), means["full"])
    assert len(figures.dots_with_error(FRAME, "step", "loss", "method", panel="method").axes) == 2


def test_intervals_keep_their_order_and_the_widest_are_cut_off() -> None:
    fig = DRAWINGS["intervals"]()
    small, wide = fig.axes
    assert [text.get_text() for text in small.get_yticklabels()] == ["a", "b"]
    assert small.get_ylim() == (1.5, -0.5)
    assert small.get_xlim()[1] >= 3
    assert wide.get_xlim() == (-3, 3)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["better", "open"]


def test_colours_stand_out_from_white() -> None:
    for color in figures.COLORS:
        rgb = np.array(mpl.colors.to_rgb(color))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) >= 3, color


# How a colour looks without one kind of cone (Machado, Oliveira, Fernandes 2009), in linear RGB.
WITHOUT = {
    "long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
             [-0.003882, -0.048116, 1.051998]],
    "middle": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
              [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@pytest.mark.parametrize("cone", WITHOUT)
def test_colours_differ_without_one_kind_of_cone(cone: str) -> None:
    """The first four, of most figures, do by CIELAB ΔE; all in marker, line and hatch."""
    rgb = np.array([mpl.colors.to_rgb(color) for color in figures.COLORS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(WITHOUT[cone]).T, 0, 1) @ TO_XYZ.T / TO_XYZ.sum(axis=1)
    root = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
    lab = np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]),
                    200 * (root[:, 1] - root[:, 2])], axis=1)  # fmt: skip
    far = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    assert far[:4, :4][~np.eye(4, dtype=bool)].min() > 10
    for marks in (figures.MARKERS, figures.LINES, figures.HATCHES):
        assert len(set(marks)) == len(figures.COLORS)


def test_use_style_applies_to_ones_own_figures() -> None:
    with mpl.rc_context():
        figures.use_style()
        assert mpl.rcParams["font.sans-serif"][0] == "DejaVu Sans"


@pytest.mark.slow
def test_texts_of_a_hundred_images_touch_neither_images_nor_each_other() -> None:
    rows = 10
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "van" * 30,
    ]
    fig = figures.image_grid(
        np.zeros((10 * rows, 3, 2, 2)),
        columns=10,
        captions=[f"{name} λ=0.013\nseed 0" for name in names] * rows,
        correct=[index % 3 > 0 for index in range(10 * rows)],
        column_labels=[f"the {name} class" for name in names],
        row_labels=[f"deep support vectors of seed {row}" for row in range(rows)],
        title="Ten columns " * 30,
    )
    fig.draw_without_rendering()
    (axes,) = fig.axes
    texts = [artist.get_window_extent() for artist in axes.texts]
    images = [artist.get_window_extent() for artist in axes.images]
    assert len(texts) == 10 * rows + 10 + rows + 1
    for index, box in enumerate(texts):
        assert not any(box.overlaps(other) for other in texts[index + 1 :] + images)
    assert min(artist.get_fontsize() for artist in axes.texts) >= 8 * figures.SMALLEST
    assert max(box.x1 for box in texts) < fig.bbox.x1 * 1.1, "a long title is broken"


def plane_axes() -> tuple[Figure, mpl.axes.Axes]:
    fig = Figure(figsize=(3, 3), dpi=100)
    return fig, fig.add_axes((0, 0, 1, 1))


def colors_at(fig: Figure, axes: mpl.axes.Axes, places: list[tuple[float, float]]) -> np.ndarray:
    """Return the drawn colour [n, 3] at data coordinates."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(int)
    return np.array([pixels[int(y), int(x)] for x, y in axes.transData.transform(places)])


@pytest.mark.parametrize("binary", [True, False])
def test_regions_have_their_classes_colours_and_a_boundary(binary: bool) -> None:
    fig, axes = plane_axes()
    x1 = np.broadcast_to(np.linspace(-2, 2, 41)[:, None], (41, 41))  # class 1 where x₁ > 0
    scores = x1[:, :, None] if binary else np.stack([-x1, x1], axis=2)
    figures.draw_regions(axes, scores, 2.0)
    axes.axis("off")
    assert axes.get_xlim() == axes.get_ylim() == (-2, 2)
    left, middle, right = colors_at(fig, axes, [(-1, 1), (0, 0), (1, -1)])
    for color, k in ((left, 0), (right, 1)):
        tint = 255 * (0.1 * np.array(mpl.colors.to_rgb(figures.COLORS[k])) + 0.9)
        assert np.abs(color - tint).max() <= 2
    assert middle.max() < 120, "the boundary is a dark line"


def test_regions_with_one_winner_have_no_boundary_and_bad_scores_are_refused() -> None:
    _, axes = plane_axes()
    figures.draw_regions(axes, np.ones((5, 5, 1)), 1.0)
    assert len(axes.collections) == 1
    for wrong in (np.zeros((5, 5)), np.zeros((0, 0, 2))):
        with pytest.raises(ValueError, match=r"scores: expected shape \[side, side, K\]"):
            figures.draw_regions(axes, wrong, 1.0)


def test_points_have_areas_proportional_to_their_weights() -> None:
    _, axes = plane_axes()
    inputs, labels = np.arange(8.0).reshape(4, 2), np.array([0, 1, 1, 0])
    figures.draw_points(axes, inputs, labels, np.array([2.0, 1.0, 0.0, 1e-3]), area=100)
    small, large, other_small, other_large = axes.collections
    assert small.get_offsets().tolist() == inputs[labels == 0].tolist()
    assert other_small.get_offsets().tolist() == inputs[labels == 1].tolist()
    assert large.get_sizes().tolist() == [100, 4], "a tiny weight can be seen"
    assert other_large.get_sizes().tolist() == [50], "a weight of zero has no large marker"
    face = mpl.colors.to_hex(large.get_facecolor()[0])
    assert face == figures.COLORS[0]


def test_points_share_a_scale_where_it_is_given_and_weights_must_fit() -> None:
    _, axes = plane_axes()
    inputs, labels = np.zeros((2, 2)), np.zeros(2, dtype=int)
    figures.draw_points(axes, inputs, labels, np.ones(2), largest=4.0, area=100)
    assert axes.collections[1].get_sizes().tolist() == [25, 25]
    figures.draw_points(axes, inputs, labels, np.zeros(2))
    figures.draw_points(axes, inputs, labels)
    assert all(len(drawn.get_offsets()) == 0 for drawn in axes.collections[3::2])
    with pytest.raises(ValueError, match=r"weights: expected one per point, \[2\], got \[3\]"):
        figures.draw_points(axes, inputs, labels, np.ones(3))


def test_raised_contrast_spans_the_range_and_keeps_grey_grey() -> None:
    dull = 0.4 + 0.1 * np.random.default_rng(0).random((2, 1, 20, 20)).repeat(3, axis=1)
    raised = figures.raise_contrast(dull)
    assert raised.shape == dull.shape
    assert (raised.min(), raised.max()) == (0, 1)
    assert np.array_equal(raised[:, 0], raised[:, 2])  # one stretch for all channels
    clipped = (raised[0, 0] == 0).mean(), (raised[0, 0] == 1).mean()
    assert clipped == pytest.approx((0.01, 0.01), abs=0.006)
    order = dull[1, 0].ravel().argsort()
    assert (np.diff(raised[1, 0].ravel()[order]) >= 0).all()
    assert np.isfinite(figures.raise_contrast(np.full((1, 3, 4, 4), 0.5))).all()


def test_animation_has_every_frame_its_text_and_runs_for_ever(tmp_path: Path) -> None:
    frames = [np.full((6, 9, 3), level) for level in (0.0, 0.5, 1.0)]
    path = figures.write_animation(frames, tmp_path / "a.png", alt=ALT, milliseconds=50)
    with Image.open(path) as opened:
        assert (opened.size, opened.n_frames, opened.info["loop"]) == ((9, 6), 3, 0)
        assert opened.text["Description"] == ALT
        for number, level in enumerate((0, 128, 255)):
            opened.seek(number)
            assert abs(int(np.asarray(opened.convert("RGB")).mean()) - level) <= 1
        assert opened.info["duration"] == 2000
    again = figures.write_animation(frames, tmp_path / "b.png", alt=ALT, milliseconds=50)
    assert again.read_bytes() == path.read_bytes()


def test_smooth_grid_differs_from_crisp_pixels(tmp_path: Path) -> None:
    crisp = write(figures.image_grid(IMAGES), tmp_path / "crisp")[0]
    assert write(figures.image_grid(IMAGES, smooth=True), tmp_path / "smooth")[0] != crisp


def test_rare_colours_of_a_map_are_kept():
    values = np.random.default_rng(0).random((1000, 200)) ** 4  # few are bright
    heat = mpl.colormaps["cividis"](values)[:, :, :3]
    bar = np.repeat(mpl.colormaps["cividis"](np.linspace(0, 1, 200))[None, :, :3], 8, axis=0)
    letters = np.tile(np.linspace(0, 1, 200)[None, :, None], (10, 1, 3))  # over 256 colours in all
    levels = (255 * np.vstack([heat, bar, letters])).round().astype(np.uint8)
    raw = io.BytesIO()
    Image.fromarray(levels).save(raw, "png")
    with Image.open(io.BytesIO(figures.compact(raw.getvalue(), {}))) as small:
        change = np.abs(np.asarray(small.convert("RGB")).astype(int) - levels)
    assert change.max() <= 16


def test_a_category_has_its_colour_also_where_another_one_is_missing():
    kinds = pd.Categorical(["undecided", "better"], ["better", "worse", "undecided"])
    rows = pd.DataFrame({"row": list("ab"), "gain": [0.0, 2.0], "low": [-1.0, 1.0],
                         "high": [1.0, 3.0], "finding": kinds})  # fmt: skip
    fig = figures.intervals(rows, "row", hue="finding", x_label="points")
    handles, names = fig.axes[0].get_legend_handles_labels()
    colours = {name: one.lines[0].get_color() for name, one in zip(names, handles, strict=True)}
    assert colours == {"better": figures.COLORS[0], "undecided": figures.COLORS[2]}


def test_the_number_of_a_negative_bar_stands_below_it():
    frame = pd.DataFrame({"x": ["a", "b"], "y": [-2.0, 3.0]})
    axes = figures.bar_with_error(frame, "x", "y").axes[0]
    found = {text.get_text(): text for text in axes.texts}
    stands = {name: (text.xy[1], text.get_va()) for name, text in found.items()}
    assert stands == {"−2": (-2, "top"), "3": (3, "bottom")}
