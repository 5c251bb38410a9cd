"""One cell of Table 2 run again by the notebook's own code agrees with what was recorded."""

from __future__ import annotations

import json
import re

import pytest

from companion.cli import main
from companion.ledger import table2
from companion.ledger.table2 import NOTEBOOK, TableCell, recorded_cell, rerun
from companion.runs import repository_root
from dsvlib._errors import RequestError

DSV = TableCell("DSV", 1, 0, 19.5, 2.6, 3, 0, "quick", {})


def test_a_recorded_cell_comes_with_its_parameters() -> None:
    cell = recorded_cell("DSV", 1, 1, preset="quick")
    assert cell.parameters["dataset"] == "digits"
    assert cell.count == cell.parameters["seeds"][0]
    assert 0 < cell.std < cell.mean < 100


def test_a_cell_that_is_not_in_the_table_is_named() -> None:
    with pytest.raises(RequestError, match=r"cell of Table 2 at quick 'DSV 1 3'"):
        recorded_cell("DSV", 1, 3, preset="quick")


def test_within_the_spread() -> None:
    assert DSV.holds([19.0, 20.0])
    assert DSV.holds([22.0])
    assert not DSV.holds([22.2])
    assert not DSV.holds([16.8, 16.8])


def test_the_notebook_says_which_cells_are_its_protocol() -> None:
    path = repository_root() / "notebooks" / f"{NOTEBOOK}.ipynb"
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in found if "protocol" in c["metadata"].get("tags", [])]
    text = "\n".join("".join(cell["source"]) for cell in tagged)
    for name in ("make", "teach", "protocol"):
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), name


def test_running_a_cell_again_gives_the_recorded_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cell", "same real", "1", "1"])
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    assert "same real, 1 per class, 1 shot: " in said.out
    count = recorded_cell("same real", 1, 1, preset="quick").count
    assert len(re.findall(r"^seed \d+: ", said.out, re.MULTILINE)) == count


def test_another_number_than_recorded_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table2, "rerun", lambda *_, **__: [1.0, 2.0])
    with pytest.raises(SystemExit) as stop:
        main(["cell", "DSV", "1", "1"])
    assert stop.value.code == 1
    assert "expected a mean within" in capsys.readouterr().err


def test_parameters_that_are_gone_are_told() -> None:
    cell = recorded_cell("noise", 1, 0, preset="quick")
    cell.parameters["wings"] = 2
    said: list[str] = []
    (found,) = rerun(cell, seeds=[cell.seed], echo=said.append)
    gone = "the recorded run had wings = 2, which 05_fewshot_retraining now"
    assert any(line.startswith(gone) for line in said)
    assert said[-1] == f"seed {cell.seed}: {found:.1f} %"
