"""Numbers in running text are the recorded ones, and what names them is seen by nobody."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from checkout import make_checkout, whole_run, write_notebook, write_presets

from companion.ledger.prose import COMMENT, fill, outdated, pages, plain, recorded, write_numbers
from companion.notebooks import student_copy
from companion.runs import Run, figures_root
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
