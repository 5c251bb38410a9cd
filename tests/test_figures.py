"""Figures: the same numbers give the same bytes, and every picture can be read without eyes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dsvlib import figures

ALT = "Three of four digits are <recognised> & one is not; λ falls"
FRAME = pd.DataFrame(
    {
        "step": [0, 1, 2] * 4,
        "loss": np.linspace(1, 0.1, 12),
        "method": ["full"] * 6 + ["half"] * 6,
        "sd": [0.1] * 12,
    }
)
IMAGES = np.linspace(0, 1, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5)

DRAWINGS: dict[str, Callable[[], Figure]] = {
    "grid": lambda: figures.image_grid(
        IMAGES, columns=2, captions=list("abcd"), correct=[True, True, False, True], title="Four"
    ),
    "grey": lambda: figures.image_grid(IMAGES[:, :1], row_labels=["x"], column_labels=list("abcd")),
    "curve": lambda: figures.curve(FRAME, "step", "loss", "method", reference={"chance": 0.5}),
    "bar": lambda: figures.bar_with_error(FRAME, "step", "loss", "method", error="sd", title="T"),
    "heatmap": lambda: figures.heatmap(np.eye(3), x_label="predicted", y_label="label"),
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


def test_plots_refuse_missing_columns_and_wrong_matrices() -> None:
    with pytest.raises(ValueError, match=r"columns \['los'\]"):
        figures.curve(FRAME, "step", "los")
    with pytest.raises(ValueError, match="expected rows"):
        figures.bar_with_error(FRAME.iloc[:0], "step", "loss")
    with pytest.raises(ValueError, match="matrix"):
        figures.heatmap(np.zeros(3))


def test_curve_bands_are_the_deviation_over_repetitions() -> None:
    frame = pd.DataFrame({"x": [0, 0, 1, 1], "y": [1.0, 3.0, 2.0, 2.0]})
    summary = figures._summary(frame, "x", "y", None)
    assert summary["mean"].tolist() == [2.0, 2.0]
    assert summary["spread"].tolist() == pytest.approx([2**0.5, 0.0])


def test_colours_stand_out_from_white() -> None:
    for color in figures.COLORS:
        rgb = np.array(mpl.colors.to_rgb(color))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) >= 3, color


def test_use_style_applies_to_ones_own_figures() -> None:
    with mpl.rc_context():
        figures.use_style()
        assert mpl.rcParams["font.sans-serif"][0] == "DejaVu Sans"


@pytest.mark.parametrize("rows", [1, 10])
def test_texts_of_a_grid_of_ten_columns_touch_neither_images_nor_each_other(rows: int) -> None:
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
        "lorry",
    ]
    fig = figures.image_grid(
        np.zeros((10 * rows, 3, 2, 2)),
        columns=10,
        captions=[f"{name} λ=0.013\nseed 0" for name in names] * rows,
        correct=[index % 3 > 0 for index in range(10 * rows)],
        column_labels=[f"the {name} class" for name in names],
        row_labels=[f"deep support vectors of seed {row}" for row in range(rows)],
        title="Ten columns",
    )
    fig.draw_without_rendering()
    (axes,) = fig.axes
    texts = [artist.get_window_extent() for artist in axes.texts]
    images = [artist.get_window_extent() for artist in axes.images]
    assert len(texts) == 10 * rows + 10 + rows + 1
    for index, box in enumerate(texts):
        assert not any(box.overlaps(other) for other in texts[index + 1 :] + images)
    assert min(artist.get_fontsize() for artist in axes.texts) >= 7
