"""What a run repeats of the recorded values: each verdict by hand, and the words at the end."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from checkout import publish, publish_at

from companion.ledger.comparison import TOLERANCE, compare, compare_with_recorded
from companion.presets import plan
from companion.runs import Value

pytestmark = pytest.mark.usefixtures("checkout")


def verdict(own: float, recorded: float, std: float | None = None, unit: str = "") -> str:
    ours, theirs = Value("K", "x", own), Value("K", "x", recorded, std=std, unit=unit)
    return str(compare([ours], [theirs]).verdict[0])


@pytest.mark.parametrize(
    ("own", "recorded", "std", "unit", "expected"),
    [
        (0.6, 0.5, 0.1, "", "repeated"),  # exactly one standard deviation
        (0.61, 0.5, 0.1, "", "not repeated"),
        (0.545, 0.539, None, "", "repeated"),  # 1.1 %
        (-1.0, 1.0, None, "", "not repeated"),
        (100 * (1 + 1.01 * TOLERANCE), 100.0, None, "", "not repeated"),
        (101.0, 100.0, 0.0, "%", "repeated"),  # no run differed: nobody knows the spread
        (3e-13, 2e-14, None, "", "repeated"),  # both are zero up to rounding
        (1.5 + 1e-9, 1.5, 1e-12, "nats", "repeated"),
        (9.0, 1.0, 0.1, "s", "time"),
    ],
)
def test_verdict_by_hand(own, recorded, std, unit, expected) -> None:
    assert verdict(own, recorded, std, unit) == expected


def test_every_value_of_either_side_is_a_row() -> None:
    ours = [Value("K", "both", 3.0), Value("K", "new", 1.0)]
    theirs = [Value("K", "gone", 2.0, std=0.5), Value("K", "both", 1.0, std=0.5)]
    table = compare(ours, theirs).set_index("quantity")
    assert list(table.verdict) == ["only recorded", "not repeated", "only own"]
    both = table.loc["both"]
    assert (both.recorded, both["std"], both.own, both.difference) == (1.0, 0.5, 3.0, 2.0)
    assert both.allowed == 0.5
    assert math.isnan(table.loc["gone"].own)
    assert compare([], []).empty


def test_the_words_say_how_many_which_and_by_how_much(checkout: Path) -> None:
    (job,) = plan()
    where = {job.notebook: (job.directory, job.recorded)}
    table = checkout / "comparison.csv"
    publish(job, steps=6.0)
    assert compare_with_recorded(where, table) == "not compared: 01, no recorded run"
    assert not table.exists()
    publish_at(job.recorded, steps=5.0)
    text = compare_with_recorded(where, table).splitlines()
    assert text[0].startswith("0 of 1 recorded values repeated within their spread")
    assert text[1].split()[-2:] == ["difference", "of_what_is_allowed"]
    assert text[2].split() == ["01", "K1", "steps", "5.00", "±", "0.50", "6", "+1", "2.0"]
    assert text[3] == "all of them: comparison.csv"
    (row,) = pd.read_csv(table).to_dict("records")
    assert (row["own"], row["recorded"], row["verdict"]) == (6.0, 5.0, "not repeated")
    record = job.recorded / "record.json"
    record.write_text(record.read_text().replace("5", "6"))
    assert compare_with_recorded(where, table).startswith("not compared: 01, figures of quick/01_")
    publish_at(job.recorded, steps=5.0)
    publish(job, steps=5.5)
    text = compare_with_recorded(where, table).splitlines()
    assert text[0].startswith("1 of 1 ")
    assert len(text) == 2
