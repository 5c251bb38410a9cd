"""Recording, the maintainers' act: what a run of one's own made becomes what a release shows.

Nothing else writes to the figures, ledgers, results and notebook outputs that git tracks.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from companion.execution import exclusive
from companion.ledger.claims import write_claims
from companion.ledger.figure_wall import write_wall
from companion.ledger.prose import write_numbers
from companion.ledger.results import write_results
from companion.notebooks import less_wide, refresh_notebooks, write_student_copies
from companion.presets import Job, plan
from companion.runs import (
    RECORD,
    copy_recorded,
    digest,
    figures_root,
    git_state,
    read_record,
    repository_root,
    write_json,
)
from companion.workflow import up_to_date
from dsvlib._errors import DsvError, RequestError

LARGE = 200_000  # bytes from which a picture is committed less wide: photographs, and those with
WIDTHS = {"RGB": (800, 600, 480), "P": (1200, 900)}  # a palette, which have letters to read
IN_NOTEBOOKS = "quick"  # the preset whose outputs the committed notebooks hold


def record(
    preset: str = "quick",
    *,
    only: Sequence[str] = (),
    device: str | None = None,
    data_root: str | None = None,
    echo: Callable[[str], object] = print,
) -> None:
    """Copy whole runs of this checkout into what git tracks, with ledger, results and outputs.

    `device` and `data_root` are those of the run. Raises DsvError, before anything is written,
    unless the checkout is a clean commit and every run was made from one, by the present code; and
    at the end where a number in the text has a source that is not recorded.
    """
    if preset == "smoke":
        raise RequestError("a smoke run is no result and is not recorded; choose another --preset")
    with exclusive(uuid.uuid4().hex):
        if git_state()["dirty"] is not False:
            raise DsvError(
                "recording needs a clean commit, and git status shows changes or no git checkout; "
                "commit or stash them, run dsv reproduce again if code was among them"
            )
        jobs = plan(preset, only=only, device=device, data_root=data_root)
        for job in jobs:
            _check(job)
        for job in jobs:
            copy_recorded(job.directory, job.recorded, _shrink)
            if job.repetition is not None:
                _keep_values(job.recorded)
        write_wall(figures_root() / preset)
        write_claims(preset)
        write_results(preset)
    if preset == IN_NOTEBOOKS:
        refresh_notebooks(preset, only, device=device, data_root=data_root)
    echo(f"{len(jobs)} runs of preset {preset} recorded; look at git diff, then commit")
    try:
        changed = [path.relative_to(repository_root()).as_posix() for path in write_numbers()]
    finally:
        write_student_copies()  # they repeat the text
    if changed:
        echo(f"numbers in the text changed: {', '.join(changed)}; do the sentences still hold?")


def _check(job: Job) -> None:
    """Raise DsvError unless the job's own run is whole, of the present code and a clean commit."""
    fix = f"dsv reproduce --preset {job.preset} --only {job.notebook}"
    if not up_to_date(job):
        raise DsvError(
            f"{job.name}: expected a whole run here by the present code, parameters, --device and "
            f"--data-root, found none; run {fix}"
        )
    if read_record(job.directory)["dirty"] is not False:
        raise DsvError(
            f"{job.name}: expected a run from a clean commit, got one from changed files; "
            f"run {fix} --force"
        )


def _keep_values(directory: Path) -> None:
    """Leave of a repetition at another seed what the ledger reads: its values, in its record."""
    about = read_record(directory)
    about |= {"files": {}, "unpublished": about.get("unpublished", {}) | about["files"]}
    for path in directory.iterdir():
        if path.name != RECORD:
            path.unlink()
    write_json(directory / RECORD, about | {"digest": digest(about)})


def _shrink(path: Path) -> None:
    """Make a large picture that does not move less wide."""
    with Image.open(path) as picture:
        still = getattr(picture, "n_frames", 1) == 1
        widths = WIDTHS.get(picture.mode, (picture.width,))
        if not still or picture.width < widths[-1] or path.stat().st_size <= LARGE:
            return
        texts = {k: str(v) for k, v in picture.text.items()}  # type: ignore[attr-defined]
        full = picture.convert("RGB")
    path.write_bytes(less_wide(full, widths, LARGE, texts))
