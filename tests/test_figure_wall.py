"""The wall shows what whole records say, and names those that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from checkout import whole_run
from matplotlib.figure import Figure

from companion.ledger.figure_wall import write_wall
from companion.runs import Run, digest, figures_root, write_json

pytestmark = pytest.mark.usefixtures("checkout")


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
    folder = publish("01_line").parent
    path = write_wall(folder)
    assert path == checkout / "figures" / "quick" / "README.md"
    wall = path.read_text()
    assert '<img src="01_line/line.png" alt="A line [thin] that rises"' in wall
    assert 'href="01_line/line.svg">vector picture (SVG)</a>' in wall
    assert 'href="01_line/line.csv">tidy data (CSV)</a>' in wall
    assert '<li>Its numbers · <a href="01_line/numbers.csv">tidy data (CSV)</a>' in wall
    assert '<code class="command">dsv reproduce --preset quick --only 01_line</code>' in wall
    cells = "<td>K1|a</td><td>steps</td><td>5.00 ± 0.50 %</td><td>1</td><td>7</td>"
    assert cells in wall
    assert "<td>K12</td><td>cosine</td><td>0.988</td><td>1</td><td></td>" in wall
    assert "\n\n" not in wall[wall.index("<section>") :].strip()
    assert str(checkout) not in wall


def test_a_run_of_ones_own_gets_a_page_to_open(checkout: Path) -> None:
    own = checkout / "build" / "runs" / "quick"
    own.parent.mkdir(parents=True)
    publish("01_line").parent.rename(own)
    (own / "01_line.ipynb").write_text("what papermill left")
    path = write_wall(own, "3 of 4 values < repeated\n  K1  5 & 6")
    assert path == own / "index.html"
    page = path.read_text()
    assert "3 of 4 values &lt; repeated\n  K1  5 &amp; 6\n" in page
    assert '<img src="01_line/line.png"' in page
    assert '<a href="01_line.ipynb">executed notebook</a>' in page
    assert '<img src="01_line/line.png"' in (own / "README.md").read_text()


def test_only_what_is_committed_is_linked() -> None:
    directory = publish("01_line")
    record = json.loads((directory / "record.json").read_text())
    (directory / "line.svg").unlink()
    del record["digest"]
    record["unpublished"] = {"line.svg": record["files"].pop("line.svg")}
    write_json(directory / "record.json", record | {"digest": digest(record)})
    wall = write_wall(directory.parent).read_text()
    assert ".svg" not in wall
    assert '<a class="picture" href="01_line/line.png">' in wall
    assert "01_line/line.csv" in wall


def test_run_that_is_not_whole_is_named_and_not_shown() -> None:
    _, broken = publish("01_line"), publish("02_more")
    (broken / "line.svg").unlink()
    wall = write_wall(figures_root() / "quick").read_text()
    assert "02_more/line.png" not in wall
    assert "<em>No complete run: figures of quick/02_more" in wall
    assert "line.svg is missing; run dsv reproduce --preset quick --only 02_more</em>" in wall
    assert "01_line/line.png" in wall
