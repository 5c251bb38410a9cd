"""What jobs will take, and how they are cut into slices for machines that are lent for minutes.

They are cut by what git tracks (records, ``expected_s``) and not by what ran here, so that all
machines with the same commit cut alike. The runs of all slices, copied into one place, are one run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from companion.data_needs import data_needed
from companion.presets import Job
from companion.runs import RecordError, read_record
from dsvlib._errors import RequestError
from dsvlib._progress import duration

PIECE_S = 540.0  # of the ten minutes that such a machine gives to a command


@dataclass(frozen=True)
class Forecast:
    """What one job took when it was last run or recorded; None where nobody knows."""

    job: str
    seconds: float | None
    threads: int | None
    device: str
    bound: bool = False  # it will take less: what is known is a larger run

    def __str__(self) -> str:
        if self.seconds is None:
            return "unknown: no recorded run"
        cores = "" if self.threads is None else f" on {_cores(self.threads)}"
        gpu = f" ({self.device})" if self.device.startswith("cuda") else ""
        return f"{'at most ' * self.bound}{duration(self.seconds)}{cores}{gpu}"


def expected(job: Job, *, own: bool = True) -> Forecast:
    """Return what the job took in the last run here, else where it was recorded, else at all.

    Without `own`, runs here do not count, so that it is the same wherever the commit is. Where a
    repetition has no record, that of the run which it repeats stands for it; a smoke run, which
    nobody records, takes less than a quick one.
    """
    first = replace(job, repetition=None)
    places = [job.directory, job.recorded, first.directory, first.recorded]
    if not own:
        places = [job.recorded, first.recorded]
    if job.preset == "smoke":
        places.append(replace(first, preset="quick").recorded)
    for directory in places:
        with suppress(RecordError):
            record = read_record(directory)
            threads, device = record["environment"]["threads"], record["environment"]["device"]
            bound = record["preset"] != job.preset
            return Forecast(job.name, float(record["seconds"]), threads, device, bound)
    return Forecast(job.name, job.expected_s, None, "")


def total(forecasts: Iterable[Forecast], jobs: int = 1) -> str:
    """Return the sum over notebooks that have to run, `jobs` at a time, as a sentence.

    One that nobody has recorded counts as the mean of the others.
    """
    due = list(forecasts)
    known = [f.seconds for f in due if f.seconds is not None]
    if not due:
        return "nothing to run"
    if not known:
        return f"unknown, no recorded run of any of these {len(due)} notebooks"
    text = "at most " * any(f.bound for f in due)
    text += f"{duration(sum(known) / len(known) * len(due) / jobs)} for {len(due)} runs"
    if threads := {f.threads for f in due if f.threads}:
        text += f", recorded on {' or '.join(map(_cores, sorted(threads)))}"
    guessed = len(due) - len(known)
    return text + (f"; {guessed} without a recorded run count as the others" if guessed else "")


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def cut(jobs: Sequence[Job], part: str) -> list[Job]:
    """Return the jobs of slice `part`, such as ``1/6``, in their order.

    Raises RequestError for what is no slice.
    """
    known = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", part)
    number, count = map(int, known.groups()) if known else (0, 0)
    if not 1 <= number <= count:
        raise RequestError(f"--slice: expected I/N with 1 ≤ I ≤ N, such as 1/6, got {part!r}")
    names = _slices(_seconds(jobs), count)[number - 1]
    return [job for job in jobs if job.name in names]


def _seconds(jobs: Sequence[Job]) -> dict[str, float]:
    """Return what each job is taken to last: one that nobody knows as the mean of the others."""
    known = {job.name: expected(job, own=False).seconds for job in jobs}
    times = [s for s in known.values() if s is not None] or [0.0]
    return {name: sum(times) / len(times) if s is None else s for name, s in known.items()}


def _slices(seconds: Mapping[str, float], count: int) -> list[dict[str, float]]:
    """Return each slice's jobs with their seconds: the longest first, into the lightest slice."""
    slices: list[dict[str, float]] = [{} for _ in range(count)]
    for name in sorted(seconds, key=lambda name: (-seconds[name], name)):
        lightest = min(slices, key=lambda one: (sum(one.values()), len(one)))
        lightest[name] = seconds[name]
    return slices


def preview(jobs: Sequence[Job], part: str | None, data_root: str | None) -> Iterator[str]:
    """Yield what a run of `jobs`, or of a slice of them, would take and need; nothing runs."""
    chosen = list(jobs) if part is None else cut(jobs, part)
    times = [expected(job, own=False) for job in chosen]
    for job, time in zip(chosen, times, strict=True):
        alone = f" · alone more than {duration(PIECE_S)}" if (time.seconds or 0) > PIECE_S else ""
        yield f"{job.name:32} {time}{alone}"
    yield f"{'together, one after another':32} {total(times)}"
    for name, state in data_needed(chosen, Path(data_root) if data_root else None).items():
        yield f"{f'data {name}':32} {state}"
    seconds = _seconds(jobs)
    fits = (
        count
        for count in range(1, len(jobs) + 1)
        if all(len(s) < 2 or sum(s.values()) <= PIECE_S for s in _slices(seconds, count))
    )
    if any(seconds.values()):
        longer = sum(s > PIECE_S for s in seconds.values())
        apart = f"; longer alone: {longer}" if longer else ""
        yield f"{f'slices of {duration(PIECE_S)}':32} {next(fits)}{apart}"
