"""The wall and the summary show what whole records say, and name those that are not whole."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from checkout import make_checkout, whole_run
from matplotlib.figure import Figure

from companion.ledger.figure_wall import fill_results, summary, write_wall
from companion.runs import Run, figures_root


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_checkout(tmp_path, monkeypatch)


def publish(notebook: str) -> Path:
    with whole_run(figures_root() / "quick" / notebook):
        run = Run.start(notebook, preset="quick", seed=0)
    frame = pd.DataFrame({"x": [0, 1]})
    fig = Figure(figsize=(2, 1))
    fig.add_subplot().plot([0, 1])
    run.save_figure(fig, "line", alt="A line\n[thin] that rises", data=frame, caption="A line")
    run.save_table(frame, "numbers", caption="Its numbers")
    run.record("K1|a", "steps", 5, std=0.5, unit="%", paper=7)
    run.record("K12", "cosine", 0.98765)
    run.complete()
    return run.directory


def test_wall_links_pictures_tables_and_values(checkout: Path) -> None:
    publish("01_line")
    path = write_wall(figures_root() / "quick")
    assert path == checkout / "figures" / "quick" / "README.md"
    wall = path.read_text()
    assert "![A line (thin) that rises](01_line/line.png)" in wall
    assert "**digits · quick** · A line · [svg](01_line/line.svg) · [csv](01_line/line.csv)" in wall
    assert "Its numbers · [csv](01_line/numbers.csv) · [how it was made]" in wall
    assert "`dsv reproduce --preset quick --only 01_line`" in wall
    assert r"| K1\|a | steps | 5.00 ± 0.50 % | 1 | 7 |" in wall
    assert "| K12 | cosine | 0.988 | 1 |  |" in wall
    assert str(checkout) not in wall


def test_run_that_is_not_whole_is_named_and_not_shown() -> None:
    whole, broken = publish("01_line"), publish("02_more")
    (broken / "line.svg").unlink()
    wall = write_wall(figures_root() / "quick").read_text()
    assert "02_more/line.png" not in wall
    assert "*No complete run: figures of quick/02_more" in wall
    assert "line.svg is missing; run dsv reproduce --preset quick --only 02_more*" in wall
    assert "01_line/line.png" in wall
    assert summary([whole, broken]) == summary([whole])


def test_summary_aligns_the_values() -> None:
    lines = summary([publish("01_line")]).splitlines()
    assert lines == ["K1|a  steps   5.00 ± 0.50 %  paper 7", "K12   cosine  0.988"]
    assert summary([]) == ""


def test_readme_tables_come_from_the_records() -> None:
    publish("01_line")
    marker = "<!-- results quick:\nK12/cosine\nK9/other_value\n-->\n"
    text = f"before\n{marker}| 99 |\n<!-- /results -->\nafter"
    filled = fill_results(text)
    assert "| K12 | cosine | 0.988 | 1 | – | [01](notebooks/01_line.ipynb) |" in filled
    assert "| K9 | other value | not run |" in filled
    assert "99" not in filled
    assert filled.startswith("before\n<!-- results quick:\nK12/cosine\n")
    assert filled.endswith("<!-- /results -->\nafter")
    assert fill_results(filled) == filled
