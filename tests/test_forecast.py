"""What jobs will take, and how they are cut into slices: alike on every machine with the commit."""

from __future__ import annotations

from pathlib import Path

import command_line
import pytest
from checkout import (
    END,
    PARAMETERS,
    publish,
    publish_at,
    write_notebook,
    write_presets,
)

from companion import cli, workflow
from companion.forecast import Forecast, cut, expected, preview, total
from companion.presets import Job, plan
from companion.workflow import reproduce
from dsvlib._errors import RequestError

pytestmark = pytest.mark.usefixtures("checkout")


@pytest.fixture
def jobs(checkout: Path) -> list[Job]:
    """Return seven jobs: 600, 300, 200, 200, 100 and 50 seconds, and one that nobody knows."""
    for name in ("02_b", "03_c", "04_d", "05_e", "06_f"):
        dataset = 'dataset: str = "cifar10"' if name == "03_c" else ""
        write_notebook(checkout, name, END, parameters=f"{PARAMETERS}\n{dataset}")
    seconds = {"01_line": 300, "02_b": 600, "03_c": 200, "04_d": 100, "05_e": 50}
    write_presets(checkout, quick={"expected_s": seconds, "repeat": {"03_c": [7]}})
    return plan()


def test_the_forecast_comes_from_the_nearest_run_that_is_known(checkout: Path) -> None:
    write_presets(checkout, smoke={}, quick={"repeat": {"01_line": [7]}})
    (smoke,), (job, again) = plan("smoke"), plan()
    assert total([]) == "nothing to run"
    assert total([expected(smoke)]).startswith("unknown, no recorded run")
    publish_at(job.recorded)
    known = str(expected(job))
    assert known.startswith("1 min 1")
    assert str(expected(again)) == known, "a repetition takes as long as what it repeats"
    assert str(expected(smoke)) == f"at most {known}"
    forecasts = [Forecast("a", 60, 2, "cpu"), Forecast("b", None, None, "")]
    assert total(forecasts, jobs=2) == (
        "1 min for 2 runs, recorded on 2 cores; 1 without a recorded run count as the others"
    )


def names(jobs: list[Job], part: str) -> list[str]:
    return [job.name for job in cut(jobs, part)]


@pytest.mark.parametrize("count", range(1, 11))
def test_slices_are_disjoint_and_complete(jobs: list[Job], count: int) -> None:
    slices = [names(jobs, f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(name for one in slices for name in one) == sorted(job.name for job in jobs)
    assert sum(map(bool, slices)) == min(count, len(jobs)), "none is empty before all have one"


def test_slices_are_balanced_and_what_ran_here_moves_nothing(jobs: list[Job]) -> None:
    slices = [["02_b"], ["01_line", "03_c.seed-7", "05_e"], ["03_c", "04_d", "06_f"]]
    assert [names(jobs, f"{number}/3") for number in (1, 2, 3)] == slices
    publish(jobs[0])  # of 70 seconds
    assert expected(jobs[0]).seconds == pytest.approx(70, abs=5)
    assert [names(jobs, f"{number}/3") for number in (1, 2, 3)] == slices


@pytest.mark.parametrize("part", ["7/6", "0/3", "a/b", "1/0", "-1/2", "1/2/3", "", "1", "²/3"])
def test_what_is_no_slice_is_one_sentence(part: str) -> None:
    with pytest.raises(RequestError, match=r"--slice: expected I/N with 1 ≤ I ≤ N, such as 1/6"):
        reproduce(part=part)


def test_the_preview_says_times_data_and_what_does_not_fit(jobs: list[Job], tmp_path: Path) -> None:
    assert list(preview(jobs, "1/3", None)) == [
        f"{'02_b':32} 10 min · alone more than 9 min",
        f"{'together, one after another':32} 10 min for 1 runs",
        f"{'slices of 9 min':32} 4; longer alone: 1",
    ]
    third = list(preview(jobs, "3/3", str(tmp_path)))
    assert third[2] == f"{'06_f':32} unknown: no recorded run"
    assert third[4].split() == [
        "data",
        "cifar10",
        "missing:",
        *f"dsv data fetch cifar10 --root {tmp_path}".split(),
    ]
    assert next(preview(jobs, "9/9", None)).endswith("nothing to run")


def test_a_slice_runs_and_a_dry_run_does_not(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def schedule(jobs: list[Job], *_: object, **__: object) -> None:
        started.extend(job.name for job in jobs)
        for job in jobs:
            publish(job)

    monkeypatch.setattr(workflow, "schedule", schedule)
    monkeypatch.setattr(workflow, "check_machine", lambda _: None)
    words = ("reproduce", "--slice", "2/3", "--dry-run")
    assert command_line.run(*words, main=cli.main) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("05_e  ")
    assert not started
    for number in (2, 1, 2):
        assert reproduce(part=f"{number}/3", echo=lambda _: None)
    assert started == ["01_line", "03_c.seed-7", "05_e", "02_b"]
    assert reproduce(part="9/9", echo=lambda _: None), "an empty slice is soon done"
