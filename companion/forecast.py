"""What a preset will cost, from the runs recorded before, and which data sets it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from companion.data_needs import data_sets
from companion.graph import up_to_date
from companion.presets import Job
from companion.workflow import duration, last_record
from dsvlib._files import downloads_folder
from dsvlib.data.downloads import FOLDERS, archives


@dataclass(frozen=True)
class Forecast:
    """What one job took when it was last recorded; None where nobody knows."""

    job: str
    seconds: float | None
    threads: int | None
    device: str
    current: bool

    def __str__(self) -> str:
        if self.current:
            return "up to date"
        if self.seconds is None:
            return "unknown: no recorded run"
        cores = "" if self.threads is None else f" on {_cores(self.threads)}"
        gpu = f" ({self.device})" if self.device.startswith("cuda") else ""
        return f"{duration(self.seconds)}{cores}{gpu}"


def forecast(jobs: Sequence[Job]) -> list[Forecast]:
    """Return what each job took in the run recorded last, on this or another machine."""
    found = []
    for job in jobs:
        seconds, threads, device = job.expected_s, None, ""
        if record := last_record(job):
            seconds = float(record["seconds"])
            threads, device = record["environment"]["threads"], record["environment"]["device"]
        found.append(Forecast(job.name, seconds, threads, device, up_to_date(job)))
    return found


def total(forecasts: Sequence[Forecast]) -> str:
    """Return the sum over the notebooks that have to run, as a sentence."""
    due = [f for f in forecasts if not f.current]
    known = [f for f in due if f.seconds is not None]
    if not due:
        return "nothing to run"
    text = f"{duration(sum(f.seconds or 0 for f in known))} for {len(known)} runs"
    if threads := {f.threads for f in known if f.threads}:
        text += f", recorded on {' or '.join(map(_cores, sorted(threads)))}"
    return text + (f"; {len(due) - len(known)} more unknown" if len(due) > len(known) else "")


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def data_needed(jobs: Sequence[Job], data_root: Path | None) -> dict[str, str]:
    """Return, for every data set that the jobs' parameters name, ``present`` or how to bring it."""
    needed = {}
    root = data_root or downloads_folder()
    for name in dict.fromkeys(name for job in jobs for name in data_sets(job.parameters)):
        if name == "digits":
            needed[name] = "present (bundled)"
        elif name in FOLDERS:
            there = (root / name / "train").is_dir()
            fix = f"missing: copy train/<class>/* and test/<class>/* to {root / name}"
            needed[name] = "present" if there else f"{fix}, or name its folder with --data-root"
        elif name.startswith("folder:"):
            path = Path(name.removeprefix("folder:"))
            needed[name] = "present" if path.is_dir() else f"missing: expected the folder {path}"
        else:
            there = all((root / archive.path).is_file() for archive in archives(name))
            needed[name] = "present" if there else f"missing: dsv data fetch {name} --root {root}"
    return needed
