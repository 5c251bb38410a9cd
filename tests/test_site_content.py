"""The site's pages as text: what records and notebooks say is on them, escaped, no more."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from checkout import make_checkout, small_blind_test, whole_run, write_presets
from docutils.core import publish_doctree
from docutils.utils import SystemMessage
from jinja2 import UndefinedError
from matplotlib.figure import Figure
from PIL import Image

import dsvlib
from companion import cli
from companion.blind_test import BlindTest
from companion.ledger.claims import Verdict, blind_test_folder, claim_rows
from companion.ledger.figure_wall import PublishedRun, read_runs
from companion.presets import read_presets
from companion.runs import BADGES, Run, figures_root, read_record
from companion.site import build, content, pictures
from companion.site.render import fragment, render
from dsvlib._errors import DsvError, RequestError
from dsvlib._files import PACKAGE


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_checkout(tmp_path, monkeypatch)
    (root / "docs").mkdir()
    for name in ("own-classifier", "running"):
        (root / f"docs/{name}.md").write_text(f"# {name}\n")
    (root / "docs/findings.md").write_text("# Found\n\n[pictures](../figures/quick/README.md)\n")
    (root / "docs/questions.md").write_text("# Ten\n\n[first](../notebooks/01_line.ipynb)\n")
    (root / "docs/teaching.md").write_text(
        "# Notes\n\n[ten](questions.md), [all](../figures/claims/quick.md), [`copies`](../data)\n"
    )
    return root


def read_quick() -> list[PublishedRun]:
    return read_runs(figures_root() / "quick", "figures/quick/")


def publish(notebook: str = "01_line", preset: str = "quick", size: Any = (2, 1.5)) -> Path:
    with whole_run(figures_root() / preset / notebook):
        parameters = {"steps": 5, "why": "<b>"}
        run = Run.start(
            notebook, preset=preset, seed=3, parameters=parameters, data_digest="d" * 64
        )
    fig = Figure(figsize=size)
    fig.add_subplot().plot([0, 1])
    data = pd.DataFrame({"x": [0, 1]})
    run.save_figure(fig, "line_one", alt='A "line"\nthat <rises>', data=data, caption="A & B")
    run.save_table(data, "numbers", caption="not on the wall")
    run.complete()
    return run.directory


def publish_blind_test(notebook: str = "02_blind", preset: str = "cifar10", seed: int = 0) -> Path:
    with whole_run(figures_root() / preset / notebook):
        run = Run.start(notebook, preset=preset, seed=3)
    run.save_blind_test(small_blind_test(seed), caption="Without labels")
    run.complete()
    return run.directory


class Tags(HTMLParser):
    """Collect tags with their attributes; fail where they do not nest."""

    VOID = ("img", "br", "meta", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


# --- the wall ------------------------------------------------------------------------------------


def test_wall_shows_figures_with_finding_and_files(checkout: Path) -> None:
    publish()
    text = content.wall(read_quick(), {"01_line": "01 · A line"})
    assert "\n\n" not in text, "an empty line ends a block of HTML in Markdown"
    tags = Tags(text)
    assert [image["alt"] for image in tags.all("img")] == ['A "line" that <rises>']
    assert tags.all("img")[0]["src"] == "figures/quick/01_line/line_one.png"
    links = {link["href"] for link in tags.all("a")}
    assert "notebooks/01_line.html" in links
    for suffix in ("csv", "svg", "json"):
        assert f"figures/quick/01_line/line_one.{suffix}" in links
    assert "A &amp; B" in text
    assert "not on the wall" not in text
    assert str(checkout) not in text


def test_why_panel_tells_command_parameters_commit_and_data(checkout: Path) -> None:
    publish()
    ((figure,),) = (run.figures for run in read_quick())
    panel = fragment("wall.html", "why", figure, "../")
    Tags(panel)
    assert "dsv reproduce --preset quick --only 01_line" in panel
    assert "steps = 5" in panel
    assert "&lt;b&gt;" in panel
    assert "<dt>Seed</dt><dd><code>3</code>" in panel
    assert "<dt>Commit</dt>" in panel
    assert "dddddddddddd" in panel
    assert 'href="../figures/quick/01_line/line_one.csv"' in panel
    assert "of this checkout" in panel


def test_figures_of_other_code_say_so(checkout: Path) -> None:
    publish()
    path = checkout / "notebooks" / "01_line.ipynb"
    path.write_text(path.read_text().replace("steps: int = 5", "steps: int = 6"))
    ((figure,),) = (run.figures for run in read_quick())
    assert not figure.fresh
    assert "older or newer than this checkout" in fragment("wall.html", "why", figure)


def test_run_that_is_not_whole_is_named_and_its_pictures_are_not_shown(checkout: Path) -> None:
    (publish() / "line_one.svg").unlink()
    text = content.wall(read_quick(), {})
    assert "No complete run" in text
    assert "line_one.svg is missing" in text
    assert "<img" not in text


@pytest.mark.parametrize(("size", "wide"), [((2, 1.5), False), ((6, 1), True)])
def test_strips_take_a_row(checkout: Path, size: Any, wide: bool) -> None:
    publish(size=size)
    ((figure,),) = (run.figures for run in read_quick())
    assert figure.wide is wide
    assert f'class="card{" wide" * wide}"' in content.card(figure)


# --- the ledger ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    id: str
    verdict: str
    notebook: str = "01_line"
    where: str = "Fig. 1"
    statement: str = "λ < 1 & more"
    scale: str = "digits · quick"
    preset: str = "quick"
    measured: str = "a 1 (n = 3); b 2 (n = 3)"
    paper: str = "pictures only"
    tolerance: str = "≥ 2"
    reason: str = "because"


ROWS = [
    Row("K-1", "reproduced"),
    Row("K-2", "partly"),
    Row("K-3", "not reproduced"),
    Row("K-4", "not attempted", notebook="99_absent", measured="–"),
    Row("K-5", "undecided"),
]


def test_ledger_has_every_claim_in_words_also_where_nothing_ran() -> None:
    text = content.ledger(ROWS, {"01_line": "01"})
    tags = Tags(text)
    rows = [row for row in tags.all("tr") if "id" in row]
    assert [row["id"] for row in rows] == ["k-1", "k-2", "k-3", "k-4", "k-5"]
    kinds = [row["class"] for row in rows]
    assert kinds == ["row-yes", "row-partly", "row-no", "row-none", "row-open"]
    for verdict in content.VERDICTS:
        assert verdict in text
    assert "λ &lt; 1 &amp; more" in text
    assert "notebooks/99_absent.html" not in text
    assert len({symbol for _, symbol in content.VERDICTS.values()}) == 5


def test_summary_counts_each_verdict_and_links_its_claims() -> None:
    text = content.verdict_summary(ROWS)
    assert re.findall(r"<strong>(\d+)</strong>", text) == ["1"] * 5
    assert 'href="claims.html#k-3"' in text


def test_summary_takes_the_verdict_of_photographs_where_there_is_one() -> None:
    there = [
        Row(name, verdict, preset="cifar10", scale="CIFAR-10")
        for name, verdict in (("K-1", "partly"), ("K-2", "partly"), ("K-3", "not attempted"))
    ]
    text = content.verdict_summary(ROWS[:3], there)
    assert re.findall(r"<strong>(\d+)</strong>", text) == ["2", "1"]
    links = re.findall(r'href="([^"]+)"', text)
    assert links == ["wall/cifar10.html#k-1", "wall/cifar10.html#k-2", "claims.html#k-3"]
    assert re.findall(r"<small>([^<]+)</small>", text) == ["(digits · quick: reproduced)"]


def test_a_page_bears_the_badge_of_its_record(checkout: Path) -> None:
    folder = figures_root() / "quick" / "01_line"
    with whole_run(folder):
        Run.start("01_line", preset="quick", seed=0, scale="photographs").complete()
    assert build._scale(folder, "quick") == "photographs"
    assert build._scale(folder.with_name("02_more"), "quick") == BADGES["quick"]


# --- notebooks -----------------------------------------------------------------------------------


def cell(kind: str, source: str, *tags: str, outputs: Any = ()) -> dict[str, Any]:
    made = {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}}
    return made | ({"outputs": list(outputs)} if kind == "code" else {})


def example() -> dict[str, Any]:
    picture = {
        "data": {"image/png": "…"},
        "metadata": {"image/png": {"alt": "A line\nthat rises"}},
    }
    table = {"data": {"text/html": '<style scoped>\nx\n</style>\n<table border="1"></table>'}}
    return {
        "cells": [
            cell("markdown", "# 01 · Lines\n\nText."),
            cell("code", "draw()", outputs=[picture]),
            cell("code", "frame", outputs=[table]),
            cell("markdown", "## Exercises\n\n**Exercise 1 · easy, 3 minutes.** Add them."),
            cell("code", "def add(): ...  # your code", "exercise"),
            cell("code", "def add(): return 1", "solution"),
            cell("code", "assert add() == 1", "test"),
            cell("markdown", "### Exercise 2 (hard, 9 minutes): again\n\nOnce more."),
            cell("code", "def more(): ...", "exercise"),
            cell("code", "def more(): return 2", "solution"),
        ]
    }


def test_notebook_page_folds_solutions_and_keeps_findings() -> None:
    cells = content.notebook_page(example(), "01_line", origin="<b>quick</b>", preset="quick")[
        "cells"
    ]
    assert cells[0]["source"].startswith('# 01 · Lines\n\n<p class="origin"><b>quick</b> · ')
    assert cells[0]["source"].endswith("\n\nText.")
    assert cells[1]["metadata"]["mystnb"]["image"] == {"alt": "A line that rises"}
    assert cells[2]["outputs"][0]["data"]["text/html"] == "<table></table>"
    assert "hide-input" in cells[5]["metadata"]["tags"]
    assert cells[5]["metadata"]["mystnb"]["code_prompt_show"] == "Solution"
    assert "hide-input" not in cells[4]["metadata"]["tags"]
    assert "hide-input" not in cells[1]["metadata"]["tags"], "what teaches is open"
    links = {"Binder": "https://mybinder.org/x?a=1&b"}
    (top, *_) = content.notebook_page(example(), "01_line", origin="", preset="quick", links=links)[
        "cells"
    ]
    assert '<a href="https://mybinder.org/x?a=1&amp;b">run it on Binder</a>' in top["source"]
    machinery = {"cells": [cell("code", 'run.save_table(frame, "x")'), cell("code", "import os")]}
    made = content.notebook_page(machinery, "01_line", origin="", preset="quick")["cells"]
    assert ["hide-input" in c["metadata"]["tags"] for c in made] == [True, True]


def test_exercises_are_found_in_both_ways_of_writing_them() -> None:
    found = list(content.exercises(example()))
    assert [title for title, *_ in found] == [
        "Exercise 1 · easy, 3 minutes",
        "Exercise 2 (hard, 9 minutes): again",
    ]
    assert found[0][1:] == ("Add them.", "def add(): ...  # your code", "def add(): return 1")
    text = content.exercises_page({"01_line": example()}, {"01_line": "01 · Lines"})
    assert text.count('<details class="solution">') == text.count("</details>") == 2
    assert text.index("def add(): ...") < text.index("<summary>") < text.index("return 1")


def test_every_committed_exercise_is_on_the_page() -> None:
    for path in sorted((PACKAGE.parent / "notebooks").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        stubs = [c for c in notebook["cells"] if "exercise" in c["metadata"].get("tags", [])]
        found = list(content.exercises(notebook))
        assert len(found) == len(stubs), path.name


# --- documents -----------------------------------------------------------------------------------


def test_links_of_a_document_lead_to_pages_to_the_repository_or_nowhere() -> None:
    text = "[a](../notebooks/01_x.ipynb#top) [b](other.md) [c](https://x.org) [d](#here)"
    pages = {"notebooks/01_x.ipynb": "notebooks/01_x.ipynb"}
    assert content.document(text, pages) == (
        "[a](notebooks/01_x.ipynb#top) b [c](https://x.org) [d](#here)"
    )
    address = "https://github.com/me/dsv/blob/HEAD/docs/other.md"
    assert f"[b]({address}) [c]" in content.document(text, pages, "me/dsv")


@pytest.mark.parametrize("name", build.DOCUMENTS)
def test_committed_documents_link_to_every_notebook_that_they_name(name: str) -> None:
    root = PACKAGE.parent
    text = (root / "docs" / f"{name}.md").read_text(encoding="utf-8")
    names = [f"notebooks/{path.name}" for path in (root / "notebooks").glob("[0-9]*.ipynb")]
    page = content.document(text, {name: name for name in names})
    assert "](../" not in page
    for notebook in names:
        assert text.count(f"](../{notebook})") == page.count(f"]({notebook})")


# --- the reference -------------------------------------------------------------------------------


def test_reference_names_everything_public_once() -> None:
    text = "\n".join(content.reference().values())
    named = re.findall(
        r"^\.\. (?:autoclass|autofunction|py:data):: dsvlib\.[\w.]+\.(\w+)$", text, re.MULTILINE
    )
    assert sorted(named) == sorted(dsvlib.__all__)
    for module in content.public_names():
        assert f".. automodule:: dsvlib.{module}\n" in text


def test_module_without_a_chapter_is_shown_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CHAPTERS", content.CHAPTERS[1:])
    made = content.reference()
    assert "dsvlib.data.datasets.load_dataset" in made["more"]
    assert "   more" in made["index"]


@pytest.mark.parametrize("module", [m for names in content.CHAPTERS for m in names[2]])
def test_docstrings_become_valid_text(module: str) -> None:
    """docutils, strict, reads what a page makes of each docstring of the module."""
    home = __import__(f"dsvlib.{module}", fromlist=["_"])
    values = [home, *(getattr(home, name) for name in content.public_names().get(module, ()))]
    values = [value for value in values if inspect.ismodule(value) or callable(value)]
    values += [v for c in values if isinstance(c, type) for v in vars(c).values() if callable(v)]
    for value in values:
        lines = (inspect.getdoc(value) or "").splitlines()
        text = "\n".join(content.plain_docstring(lines))
        strict = {"report_level": 2, "halt_level": 2, "warning_stream": False}
        try:
            publish_doctree(text, settings_overrides=strict)
        except SystemMessage as error:
            pytest.fail(f"{module}: {error}\n{text}")


def test_docstring_keeps_layout_and_signs() -> None:
    lines = [
        "Say |x| and *args of `a*b`.",
        "",
        "    f = a * b",
        "      + |c|",
        "",
        "name",
        "    1*",
    ]
    assert content.plain_docstring(lines) == [
        *(r"Say \|x\| and \*args of `a*b`.", "", "::", "", "    f = a * b", "      + |c|", ""),
        *("name", r"    1\*"),
    ]
    assert content.plain_docstring(["Parameters", "----------", "x"]) == ["**Parameters**", "", "x"]


# --- building ------------------------------------------------------------------------------------


def test_missing_sphinx_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DsvError, match="sphinx is missing, the site is built with it; run make"):
        build._sphinx(tmp_path)


def test_a_value_that_a_page_lacks_is_refused_and_lines_are_joined() -> None:
    page = render("claims.md", ledger="a\n\n<b>\u2028&")
    assert page.endswith("\na &lt;b&gt; &amp;\n")
    with pytest.raises(UndefinedError, match="'ledger' is undefined"):
        render("claims.md")


def test_site_of_no_run_is_one_line_and_a_status(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["site", "--preset", "smoke"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsv: no complete run of preset 'smoke' to show; run dsv reproduce")


def test_unknown_preset_and_preset_without_a_run_are_one_sentence(checkout: Path) -> None:
    with pytest.raises(RequestError, match="unknown preset 'quik'; did you mean 'quick'"):
        build.build_site("quik")
    with pytest.raises(DsvError, match="no complete run of preset 'smoke' to show; run dsv"):
        build.build_site("smoke")
    assert not (checkout / "build" / "site").exists()


@pytest.fixture
def built(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What Sphinx was given, by path; the fake writes one page."""
    seen: dict[str, str] = {}

    def sphinx(work: Path) -> None:
        source, extra, html = work / "source", work / "extra", work / "html"
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            seen[str(path.relative_to(source))] = path.read_text(encoding="utf-8")
        for path in sorted(p for p in extra.rglob("*") if p.is_file()):
            seen[f"extra/{path.relative_to(extra)}"] = ""
        html.mkdir(parents=True)
        (html / "index.html").write_text("new")

    monkeypatch.setattr(build, "_sphinx", sphinx)
    monkeypatch.setattr(build, "claim_rows", lambda preset: ROWS)
    return seen


def test_build_writes_every_page_and_copies_what_they_link_to(
    checkout: Path, built: dict[str, str]
) -> None:
    publish()
    publish("02_more")
    publish(preset="smoke")
    assert set(read_presets()) == {"quick", "smoke"}
    said: list[str] = []
    html = build.build_site("quick", echo=said.append)
    assert (html / "index.html").read_text() == "new"
    assert said[-1].startswith("1 pages in ")
    pages_made = {"index.md", "claims.md", "blind-test.md", "exercises.md", "api/index.rst"}
    pages_made |= {"glossary.md", "wall/quick.md", *(f"{name}.md" for name in build.DOCUMENTS)}
    assert pages_made | {"notebooks/01_line.ipynb"} <= set(built)
    assert "wall/smoke.md" not in built, "a smoke run is no result"
    assert {
        "extra/figures/quick/01_line/line_one.png",
        "extra/notebooks/01_line.ipynb",
    } <= set(built)
    for name in ("01_line", "02_more"):
        shown = rf'src="\.\./(small/)?figures/quick/{name}/line_one\.(png|webp)"'
        assert len(re.findall(shown, built["wall/quick.md"])) == 1
    assert built["index.md"].count('src="figures/quick/') == 1  # the first is on top
    assert built["index.md"].index("01_line/line_one.png") < built["index.md"].index("What holds")
    assert "notebooks/01_line" in built["index.md"]
    assert "\nquestions\nteaching\n" in built["index.md"]
    assert built["findings.md"] == "# Found\n\n[pictures](wall/quick.md)\n"
    assert built["questions.md"] == "# Ten\n\n[first](notebooks/01_line.ipynb)\n"
    assert built["teaching.md"] == "# Notes\n\n[ten](questions.md), [all](claims.md), `copies`\n"
    assert "badge-quick" in built["notebooks/01_line.ipynb"]
    assert not [text for text in built.values() if str(checkout) in text]


def test_failed_build_leaves_the_old_site(
    checkout: Path, built: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    html = build.build_site("quick", echo=lambda _: None)
    (html / "index.html").write_text("old")

    def fails(*_: object) -> None:
        raise DsvError("no")

    monkeypatch.setattr(build, "_sphinx", fails)
    with pytest.raises(DsvError, match="no"):
        build.build_site("quick", echo=lambda _: None)
    assert (html / "index.html").read_text() == "old"
    assert [path.name for path in html.parent.iterdir()] == ["html"]


def test_what_a_killed_build_left_is_removed(checkout: Path, built: dict[str, str]) -> None:
    publish()
    (checkout / "build" / "site" / "work-99999999").mkdir(parents=True)  # above any process id
    html = build.build_site("quick", echo=lambda _: None)
    assert [path.name for path in html.parent.iterdir()] == ["html"]


def test_folder_that_cannot_be_written_is_one_sentence(
    checkout: Path, built: dict[str, str]
) -> None:
    publish()
    (checkout / "build").write_text("a file in the way")
    with pytest.raises(DsvError, match=r"cannot write to .*site: .*; free space or make it"):
        build.build_site("quick", echo=lambda _: None)


def test_other_scales_get_a_wall_and_a_ledger(checkout: Path, built: dict[str, str]) -> None:
    publish()
    publish(preset="cifar10")
    write_presets(checkout, cifar10={})
    build.build_site("quick", echo=lambda _: None)
    page = built["wall/cifar10.md"]
    assert re.search(r'src="\.\./(small/)?figures/cifar10/01_line/line_one\.', page)
    assert 'href="../notebooks/01_line.html"' in page
    assert "k-1" in page
    assert "Figures: CIFAR-10 · reduced <wall/cifar10>" in built["index.md"]


def test_broken_run_is_said_and_the_others_are_shown(checkout: Path, built: dict[str, str]) -> None:
    publish()
    (publish("02_other") / "line_one.png").unlink()
    said: list[str] = []
    build.build_site("quick", echo=said.append)
    assert "02_other" in said[0]
    assert "line_one.png is missing" in said[0]
    assert "No complete run" in built["wall/quick.md"]
    assert "extra/figures/quick/02_other/line_one.csv" not in built


def test_a_small_copy_is_smaller_or_not_there(checkout: Path, tmp_path: Path) -> None:
    publish()
    ((figure,),) = (run.figures for run in read_quick())
    noise = np.random.default_rng(0).integers(0, 255, (2, 90, 2000, 3), dtype=np.uint8)
    first, second = map(Image.fromarray, noise)
    original = tmp_path / "line_one.png"
    first.save(original)
    address = pictures.small(figure, original, tmp_path)
    assert (tmp_path / address).stat().st_size < original.stat().st_size
    with Image.open(tmp_path / address) as picture:
        assert picture.width == pictures.WIDTH
    first.save(original, save_all=True, append_images=[second])  # it moves: shown as it is
    assert pictures.small(figure, original, tmp_path) == figure.picture


def test_an_animation_becomes_a_picture_to_move_through(
    checkout: Path, built: dict[str, str]
) -> None:
    with whole_run(figures_root() / "quick" / "01_line"):
        run = Run.start("01_line", preset="quick", seed=3)
    shots = {f"step {n}": np.full((8, 16, 3), n / 4) for n in range(4)}
    run.save_animation(shots, "film", alt="A field grows bright.", caption="Four steps.")
    run.complete()
    build.build_site("quick", echo=lambda _: None)
    page = built["index.md"]
    start = page.index('<figure class="scrubber">')
    tags = Tags(page[start : page.index("</figure>", start) + len("</figure>")])
    (slider,) = tags.all("input")
    assert json.loads(slider["data-words"] or "") == list(shots)
    addresses = (slider["data-frames"] or "").split()
    assert [f"extra/{address}" in built for address in addresses] == [True] * 4
    assert tags.all("img")[0]["src"] == addresses[-1]


# --- the blind test ------------------------------------------------------------------------------


def test_without_a_recorded_set_the_page_says_so(checkout: Path, built: dict[str, str]) -> None:
    publish()
    publish_blind_test(preset="smoke")  # no result
    build.build_site("quick", echo=lambda _: None)
    assert "No run that is recorded has published its pictures yet" in built["blind-test.md"]
    assert "blind-test.js" not in built["blind-test.md"]
    assert "blind-test" in built["index.md"]


def test_the_page_asks_about_the_first_recorded_set_and_hides_the_key(
    checkout: Path, built: dict[str, str]
) -> None:
    write_presets(checkout, cifar10={}, paper={})
    publish()
    publish_blind_test(preset="paper", seed=1)
    folder = publish_blind_test()
    build.build_site("quick", echo=lambda _: None)
    page, test = built["blind-test.md"], BlindTest.load(folder)
    (section,) = [tag for tag in Tags(page).all("section") if "blind-test" in str(tag["class"])]
    picture = "figures/cifar10/02_blind/blind_test.png"
    assert section["data-picture"] == picture
    assert section["data-digest"] == read_record(folder)["files"]["blind_test.png"] == test.digest
    assert json.loads(str(section["data-classes"])) == ["cat", "dog", "frog"]
    assert (section["data-width"], section["data-count"]) == ("4", "18")
    for name in (picture, section["data-key"], "figures/cifar10/02_blind/blind_test.csv"):
        assert f"extra/{name}" in built
    assert "a classifier<" not in page
    assert "an untrained network" not in page
    assert "dsv reproduce --preset cifar10 --only 02_blind" in page
    assert "<noscript>" in page
    assert "\n\n" not in page[page.index("<section") : page.index("</section>")]


def test_the_key_is_a_script_that_fits_its_pictures() -> None:
    test = small_blind_test()
    head, _, text = content.blind_test_key(test).partition(" = ")
    found = json.loads(text.strip().rstrip(";"))
    assert head == "globalThis.blindTestKey"
    assert found["set"] == test.digest
    assert found["key"] == test.key.to_dict(orient="records")


def test_the_recorded_blind_test_is_the_one_of_its_claim() -> None:
    """What is committed: wherever DSV-F1 is reproduced, its set is the one that the page shows."""
    folder = blind_test_folder()
    if folder is not None:
        assert BlindTest.load(folder).digest == read_record(folder)["files"]["blind_test.png"]
        assert len((folder / "blind_test.png").read_bytes()) < 250_000
    for preset in read_presets():
        (row,) = (row for row in claim_rows(preset) if row.id == "DSV-F1")
        if row.verdict is Verdict.REPRODUCED:
            assert folder is not None
            own = figures_root() / preset / row.notebook
            assert BlindTest.load(own).digest == BlindTest.load(folder).digest


def test_a_preset_is_named_in_words() -> None:
    assert build._label("cifar10") == "CIFAR-10 · reduced"
    assert build._label("cifar10-ten") == "CIFAR-10 · ten per class, reduced"
    assert build._label("of my own") == "of my own"  # not recorded
