"""The tidy tables of results hold every recorded value, and those committed are the records'."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from checkout import make_checkout, whole_run

from companion.ledger.claims import claim_rows
from companion.ledger.results import (
    COLUMNS,
    measured,
    read_run,
    results,
    values_of,
    write_results,
)
from companion.runs import RecordError, Run
from dsvlib._files import repository_root

COMMITTED = sorted((repository_root() / "data" / "results").glob("*.csv"))


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_checkout(tmp_path, monkeypatch)
    with whole_run(tmp_path / "figures/quick/04_coresets"):
        run = Run.start("04_coresets", preset="quick", seed=3, parameters={"steps": 5})
    run.save_table(pd.DataFrame({"x": [1]}), "sizes", caption="one")
    run.record("DSV-T1", "gain", 2.5, std=0.1, seeds=range(3), unit="points", paper=2.57)
    run.record("DSV-T1", "alone", 1.0, n=9, note="a, b")
    run.complete()
    return tmp_path / "figures"


def test_every_value_is_a_row(figures: Path) -> None:
    table, sidecar = write_results("quick")
    assert table.parent == figures.parent / "data" / "results"
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
    assert not (figures.parent / "data").exists()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_records(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSV_ROOT", raising=False)
    text, about = results(path.stem)
    assert path.read_text(encoding="utf-8") == text, f"run dsv record --preset {path.stem}"
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


def run_at(root: Path, seed: int, steps: int = 5, **values: float) -> Path:
    parameters = {"seed": seed, "steps": steps}
    with whole_run(root / "quick" / "16_mixing"):
        run = Run.start("16_mixing", preset="quick", seed=seed, parameters=parameters)
    for name, value in values.items():
        run.record("DSV-F3", name, value, n=200, unit="%", paper=90, note="by one draw")
    run.complete()
    return run.directory


def test_values_of_repetitions_are_taken_together(figures: Path) -> None:
    folder = run_at(figures, 0, flips=60.0, alone=1.0)
    assert "repetitions" not in read_run(folder)
    run_at(figures / "seeds" / "200", 200, flips=66.0, late=2.0)
    run_at(figures / "seeds" / "100", 100, flips=63.0, late=4.0)
    found = {value.name: value for value in values_of(read_run(folder))}
    flips, alone, late = found["flips"], found["alone"], found["late"]
    assert (flips.value, flips.std, flips.n, flips.seeds) == (63.0, 3.0, 3, (0, 100, 200))
    assert (flips.unit, flips.paper) == ("%", 90)
    assert flips.note == "mean over seeds, n = 200 at each; seed 0: by one draw"
    assert (alone.value, alone.std, alone.n, alone.seeds) == (1.0, None, 200, (0,))
    assert alone.note.startswith("recorded at 1 of 3 seeds")
    assert (late.value, late.seeds) == (3.0, (100, 200))
    text, about = results("quick")
    (row,) = (r for r in csv.DictReader(io.StringIO(text)) if r["quantity"] == "flips")
    assert (float(row["value"]), float(row["std"]), row["seeds"]) == (63.0, 3.0, "0 100 200")
    listed = about["runs"]["16_mixing"]["repetitions"]
    assert [other["seed"] for other in listed] == [100, 200]
    assert listed[0]["folder"] == "figures/seeds/100/quick/16_mixing"


def test_the_ledger_takes_the_verdicts_of_all_seeds_together(figures: Path) -> None:
    run_at(figures, 0, classifier_dsv_difference=88.0)
    run_at(figures / "seeds" / "100", 100, classifier_dsv_difference=62.0)
    (row,) = (r for r in claim_rows("quick") if r.id == "DSV-F3")
    assert row.verdict == "partly"
    assert row.reason.startswith("seed 0: classifier dsv difference 88 %, ≥ 80 shown; ")
    assert row.reason.endswith("; seed 100 not reproduced")
    assert "75 ± 18 % (n = 2)" in row.measured
    run_at(
        figures, 5, classifier_dsv_difference=60.0
    )  # a base run of another seed, and another verdict
    (row,) = (r for r in claim_rows("quick") if r.id == "DSV-F3")
    assert row.verdict == "not reproduced"
    assert row.reason.endswith("; the same verdict at seed 100")


def test_a_repetition_of_another_experiment_is_refused(figures: Path) -> None:
    folder = run_at(figures, 0, flips=60.0)
    run_at(figures / "seeds" / "7", 7, steps=6, flips=1.0)
    with pytest.raises(RecordError, match="same code, data and parameters, got others at seed 7"):
        read_run(folder)
