"""The tidy tables of results hold every recorded value, and those committed are the records'."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest

from dsvlib.files import repository_root
from dsvlib.results import COLUMNS, measured, results, results_folder, write_results
from dsvlib.run import RecordError, Run

COMMITTED = sorted((repository_root() / "data" / "results").glob("*.csv"))


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DSV_RUN_ID", "DSV_RUN_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DSV_FIGURES", str(tmp_path / "figures"))
    run = Run.start("04_coresets", preset="quick", seed=3, parameters={"steps": 5})
    run.save_table(pd.DataFrame({"x": [1]}), "sizes", caption="one")
    run.record("DSV-T1", "gain", 2.5, std=0.1, seeds=range(3), unit="points", paper=2.57)
    run.record("DSV-T1", "alone", 1.0, n=9, note="a, b")
    run.complete()
    return tmp_path / "figures"


def test_every_value_is_a_row(figures: Path) -> None:
    table, sidecar = write_results("quick")
    assert table.parent == figures / "results"
    gain, alone = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))
    assert (gain["quantity"], float(gain["value"]), gain["seeds"]) == ("gain", 2.5, "0 1 2")
    assert (gain["paper_value"], gain["unit"], gain["n"]) == ("2.57", "points", "3")
    assert (alone["std"], alone["seeds"], alone["note"], alone["n"]) == ("", "3", "a, b", "9")
    about = json.loads(sidecar.read_text(encoding="utf-8"))
    run = about["runs"]["04_coresets"]
    assert run["parameters"] == {"steps": 5}
    assert run["tables"] == ["figures/quick/04_coresets/sizes.csv"]
    assert about["columns"] == list(COLUMNS)
    assert list(about["files"]) == ["quick.csv"]


def test_a_changed_record_is_refused_and_nothing_is_written(figures: Path) -> None:
    (figures / "quick" / "04_coresets" / "sizes.csv").write_text("x\n2\n")
    with pytest.raises(RecordError, match=r"sizes\.csv was changed"):
        write_results("quick")
    assert not results_folder().exists()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_records(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSV_FIGURES", raising=False)
    text, about = results(path.stem)
    assert path.read_text(encoding="utf-8") == text, f"run dsv claims --scale {path.stem}"
    sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["runs"] == about["runs"]


@pytest.mark.parametrize(
    ("value", "std", "unit", "text"),
    [
        (20.4178, 2.0123, "%", "20.4 ± 2.0 %"),
        (93.333, 11.547, "%", "93 ± 12 %"),
        (0.99935, 0.000182, "", "0.99935 ± 0.00018"),
        (100.0, 0.0, "%", "100 ± 0 %"),
        (2.8042e-13, None, "", "2.8e-13"),
        (1.5, 1e-12, "nats", "1.5 ± 1e-12 nats"),
        (5.0, float("nan"), "", "5 ± nan"),
    ],
)
def test_a_value_has_as_many_digits_as_its_spread(value, std, unit, text) -> None:
    assert measured(value, std, unit) == text
