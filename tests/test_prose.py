"""Numbers and pictures in text are the recorded ones, and what names numbers is seen by nobody."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from checkout import make_checkout, whole_run, write_notebook, write_presets
from matplotlib.figure import Figure

from companion.ledger.figure_wall import read_runs
from companion.ledger.prose import (
    COMMENT,
    PICTURE,
    describe,
    fill,
    outdated,
    pages,
    plain,
    recorded,
    write_numbers,
)
from companion.notebooks import read_notebook, student_copy
from companion.presets import notebook_names, read_presets
from companion.runs import Run, figures_root
from companion.site import content
from companion.site.content import document
from dsvlib._errors import DsvError

ROWS = {
    ("quick", "K-1", "gain"): {"value": "-0.36", "low": "-6.46", "high": "5.75", "std": ""},
    ("cifar10", "K-1", "read"): {"value": "96.0", "low": "", "high": "", "std": "1.25"},
}
TABLE = """preset,claim,quantity,value,std,low,high
quick,K-1,gain,2.04,0.5,1,3
"""


def test_a_number_is_the_recorded_one_in_its_format() -> None:
    text = (
        "It gains 9.9<!-- quick K-1 gain :+.1f --> [1<!-- quick K-1 gain.low :.1f -->, "
        "7<!-- quick K-1 gain.high :.2f -->] points, and 1,000 are read in "
        "+90<!-- cifar10 K-1 read :.0f --> ± 3<!-- cifar10 K-1 read.std :.1f --> %."
    )
    made, problems = fill(text, ROWS)
    assert problems == []
    assert plain(made) == ("It gains −0.4 [−6.5, 5.75] points, and 1,000 are read in 96 ± 1.2 %.")
    assert fill(made, ROWS) == (made, [])
    assert re.sub(r"[+−]?[\d.]+<", "<", made) == re.sub(r"[+−]?[\d.]+<", "<", text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("5<!-- quick K-2 gain :.1f -->", "no record holds it; correct its name"),
        ("5<!-- paper K-1 gain :.1f -->", "no record holds it; correct its name"),
        ("5<!-- quick K-1 gain.std :.1f -->", "no record holds it; correct its name"),
        ("5<!-- quick K-1 gain :.1q -->", "expected a format such as :.1f, got :.1q"),
        ("5<!-- quick K-1 gain -->", "expected <!-- PRESET CLAIM QUANTITY :FORMAT -->"),
        ("5<!-- quick K-1\ngain :.1f -->", "in one line"),
        ("half<!-- quick K-1 gain :.1f -->", "expected a number right before it"),
    ],
)
def test_what_is_not_recorded_is_one_sentence_and_stays(text: str, sentence: str) -> None:
    made, (problem,) = fill(text, ROWS)
    assert made == text
    assert sentence in problem


def test_other_comments_stay_in_plain_text() -> None:
    assert plain("a <!-- note --> b") == "a <!-- note --> b"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_checkout(tmp_path, monkeypatch)
    (root / "data" / "results").mkdir(parents=True)
    (root / "data" / "results" / "quick.csv").write_text(TABLE)
    (root / "README.md").write_text("a 1.0<!-- quick K-1 gain :.1f --> b\n")
    path = root / "notebooks" / "01_line.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"] = ["# Line\n", "5<!-- quick K-1 gain.low :.0f --> points"]
    path.write_text(json.dumps(notebook, indent=1) + "\n")
    return root


def test_pages_and_notebooks_are_filled_and_nothing_else_changes(checkout: Path) -> None:
    path = checkout / "notebooks" / "01_line.ipynb"
    before = path.read_text()
    assert outdated() == [
        "README.md: expected 2.0 before <!-- quick K-1 gain :.1f -->, got 1.0",
        "notebooks/01_line.ipynb: expected 1 before <!-- quick K-1 gain.low :.0f -->, got 5",
    ]
    assert write_numbers() == [checkout / "README.md", path]
    assert path.read_text() == before.replace("5<!--", "1<!--")
    assert (checkout / "README.md").read_text() == "a 2.0<!-- quick K-1 gain :.1f --> b\n"
    assert (outdated(), write_numbers()) == ([], [])


def test_a_name_that_is_not_recorded_is_told_when_all_others_are_filled(checkout: Path) -> None:
    with (checkout / "README.md").open("a") as file:
        file.write("3<!-- quick K-1 loss :.1f -->")
    with pytest.raises(DsvError, match=r"README.md: <!-- quick K-1 loss :.1f -->: no record holds"):
        write_numbers()
    assert "a 2.0<!--" in (checkout / "README.md").read_text()
    assert "no record holds it" in "".join(outdated())


def test_minutes_are_those_of_the_recorded_run_else_the_expected_ones(checkout: Path) -> None:
    write_notebook(checkout, "02_more")
    write_presets(checkout, smoke={}, cifar10={"expected_s": {"02_more": 720}})
    with whole_run(figures_root() / "quick" / "01_line"):  # started 70 s ago
        Run.start("01_line", preset="quick", seed=0, parameters={}).complete()
    rows = recorded()
    text = "9<!-- quick 01 minutes :.1f --> and 9<!-- cifar10 02 minutes :.0f --> min"
    assert plain(fill(text, rows)[0]) == "1.2 and 12 min"
    assert not {key for key in rows if key[0] == "smoke" or key[1] == "all"}
    write_presets(checkout, cifar10={"expected_s": {"01_line": 60, "02_more": 720}})
    assert recorded()["cifar10", "all", "minutes"]["value"] == "13.0"


def test_neither_site_nor_student_editions_show_where_a_number_comes_from(checkout: Path) -> None:
    notebook = nbformat.read(checkout / "notebooks" / "01_line.ipynb", as_version=4)
    assert student_copy(notebook, "01_line").cells[0].source == "# Line\n5 points"
    assert document("5<!-- quick K-1 gain.low :.0f --> points", {}) == "5 points"


def test_numbers_of_ours_in_the_pages_are_recorded() -> None:
    assert outdated() == []
    with_numbers = {path.name for path in pages() if COMMENT.search(path.read_text("utf-8"))}
    assert {"README.md", "findings.md", "15_decision_function.ipynb"} <= with_numbers


# --- pictures ------------------------------------------------------------------------------------

SHOWN = "![old](../figures/quick/01_line/line.png)"


def publish_line(alt: str) -> None:
    with whole_run(figures_root() / "quick" / "01_line"):
        run = Run.start("01_line", preset="quick", seed=0)
    fig = Figure(figsize=(2, 2))
    fig.add_subplot().plot([0, 1])
    run.save_figure(fig, "line", alt=alt)
    run.complete()


def show_line(checkout: Path) -> Path:
    path = checkout / "notebooks" / "01_line.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"] = f"# Line\n\n{SHOWN}\n\nIt rises."
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return path


def test_a_picture_in_the_text_has_the_words_of_its_figure(checkout: Path) -> None:
    path = show_line(checkout)
    (problem,) = [line for line in outdated() if "line.png" in line]
    assert "figures/quick/01_line/line.png is not recorded" in problem
    publish_line("A line: 0.1 [0.0, 0.2]\nthat *rises*")
    words = r"A line: 0.1 \[0.0, 0.2\] that \*rises\*"
    assert any(f"expected ![{words}]" in line for line in outdated())
    assert path in write_numbers()
    assert (
        f"![{words}](../figures/quick/01_line/line.png)\n\nIt rises."
        in (json.loads(path.read_text())["cells"][0]["source"])
    )
    assert outdated() == []
    assert write_numbers() == []
    text = f"![{words}](../figures/quick/01_line/line.png)"
    assert describe(text) == (text, [])


def test_a_picture_is_found_from_a_student_copy_and_is_a_card_of_the_site(checkout: Path) -> None:
    publish_line("A line that rises")
    path = show_line(checkout)
    student = student_copy(read_notebook(path), "01_line")
    assert "![old](../../figures/quick/01_line/line.png)" in student.cells[0].source
    (checkout / "CITATION.cff").write_text("repository-code: https://github.com/some-one/dsv\n")
    student = student_copy(read_notebook(path), "01_line")
    address = "https://raw.githubusercontent.com/some-one/dsv/HEAD/figures/quick/01_line/line.png"
    assert f"![old]({address})" in student.cells[0].source

    def shown(cards: dict[str, str]) -> str:
        notebook = json.loads(json.dumps(read_notebook(path)))
        page = content.notebook_page(notebook, "01_line", origin="", preset="quick", cards=cards)
        return str(page["cells"][0]["source"])

    (run,) = read_runs(figures_root() / "quick", "figures/quick/")
    (entry,) = run.figures
    small = {entry.picture: "small/line.webp"}
    source = shown({entry.picture: content.card(entry, up="../", small=small)})
    assert 'href="../figures/quick/01_line/line.' in source
    assert '<img src="../small/line.webp" alt="A line that rises"' in source
    assert source.endswith("</figure>\n\nIt rises.")
    assert "](../figures" not in source
    assert "\n\n*old*\n\n" in shown({}), "what the site has no picture of, it tells"


def test_every_picture_in_the_text_is_recorded_and_shown_wherever_the_text_is() -> None:
    root = figures_root().parent
    cards = {
        entry.picture: content.card(entry, up="../")
        for preset in read_presets()
        for run in read_runs(figures_root() / preset, f"figures/{preset}/")
        for entry in run.figures
    }
    for name in notebook_names():
        path = root / "notebooks" / f"{name}.ipynb"
        notebook = read_notebook(path)
        text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
        found = [f"figures/{picture['address']}.png" for picture in PICTURE.finditer(text)]
        assert len(found) == text.count("![") + text.count("<img"), f"{name}: another way"
        assert set(found) <= set(cards), f"{name}: a picture that no whole run has recorded"
        student = student_copy(notebook, name)
        copied = "\n".join(c.source for c in student.cells if c.cell_type == "markdown")
        # as in a repository without a name; with one it is the same path, seen from the root
        links = re.findall(r"!\[(?:\\.|[^\]])*\]\(([^)]*)\)", copied)
        places = [(path.parent / "student" / link).resolve() for link in links]
        if not any(link.startswith("https:") for link in links):
            assert places == [root.resolve() / picture for picture in found], name
        page = content.notebook_page(
            json.loads(json.dumps(notebook)), name, origin="", preset="quick", cards=cards
        )
        site = "\n".join(c["source"] for c in page["cells"] if c["cell_type"] == "markdown")
        assert site.count("<img ") == len(found), name
        assert not PICTURE.search(site), name
