"""From a preset to its figures: what is out of date, what it will cost, and what came out.

Snakemake (``Snakefile``) decides what runs, by one rule: a job's output is a file whose name is the
digest of all that makes its numbers (`done`), and it runs where that file is missing. File times,
which a checkout or a copy changes, and Snakemake's own memory count for nothing. What Snakemake
cannot see, that a folder of figures was damaged or a classifier trained anew, `forget` tells it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from companion import execution
from companion.data_needs import check_machine, data_sets
from companion.execution import child_environment, cores, end_processes, exclusive, remove_staging
from companion.forecast import cut, expected, total
from companion.ledger.comparison import compare_with_recorded
from companion.ledger.figure_wall import write_wall
from companion.presets import Job, plan
from companion.runs import (
    RecordError,
    code_digest,
    digest,
    is_current,
    jobs_home,
    own_root,
    read_record,
    repository_root,
    write_json,
)
from dsvlib._errors import DsvError, RequestError, explain
from dsvlib._files import PACKAGE, atomic_path, downloads_folder
from dsvlib.cli import probe
from dsvlib.data.downloads import FOLDERS, folder_digest


def done(job: Job) -> Path:
    """Return the file that stands where this checkout has run the job whole, and as it is now.

    Its name is the digest of code, parameters and the folders of images that they name; other data
    sets are bundled or held against what they are known by, so that their name is enough.
    """
    root = Path(job.parameters.get("data_root") or downloads_folder())
    folders = {
        name: root / name if name in FOLDERS else Path(name.removeprefix("folder:"))
        for name in data_sets(job.parameters)
        if name in FOLDERS or name.startswith("folder:")
    }
    images = {name: _images(path) for name, path in folders.items() if path.is_dir()}
    made = digest([code_digest(job.notebook), job.parameters, images])
    return job.directory / f"{made[:16]}.done"


@cache  # once a process: a set of 60,000 images takes seconds
def _images(folder: Path) -> str:
    return folder_digest(folder)[1]


def up_to_date(job: Job) -> bool:
    """Return whether this checkout ran the job whole, with this code, these parameters and images.

    What a release recorded is not enough: a fresh clone makes its own, which is what it is for.
    """
    with suppress(RecordError):
        there = done(job).is_file() and job.build(".ipynb").is_file()
        return there and is_current(read_record(job.directory))
    return False


def forget(jobs: Iterable[Job], *, force: bool = False) -> list[Job]:
    """Let every job run again that is not up to date, or all; return these."""
    stale = [job for job in jobs if force or not up_to_date(job)]
    for job in stale:
        for path in job.directory.glob("*.done"):
            path.unlink()
    return stale


def run_job(job: Job, **options: Any) -> str:
    """Run one job whether it is up to date or not: what the graph's rule calls.

    Options and result are those of `companion.execution.run_notebook`.
    """
    forget([job], force=True)
    echo = options.get("echo") or print
    target = done(job)  # before it starts: code that is changed meanwhile has another name
    echo(f"{job.name} · expected {expected(job)}")
    reason = execution.run_notebook(job, **options)
    if not reason:
        with atomic_path(target) as temporary:
            temporary.write_text(read_record(job.directory)["finished"] + "\n", encoding="utf-8")
        figures = sorted(job.directory.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
        for first in figures[:1]:
            echo(f"{job.name} · its first figure: {os.path.relpath(first, repository_root())}")
    return reason


def reproduce(
    preset: str = "quick",
    *,
    only: Sequence[str] = (),
    jobs: int = 1,
    device: str | None = None,
    data_root: str | None = None,
    force: bool = False,
    part: str | None = None,
    echo: Callable[[str], object] = print,
) -> bool:
    """Run a preset's notebooks, `jobs` at a time, and say what they repeat of the recorded values.

    Everything goes below ``build/runs``. Notebooks that are up to date are left alone unless
    `force`, and so are those outside of the slice `part`, such as ``1/6``. Returns whether every
    notebook of it succeeded; the reasons have been echoed.
    Raises RequestError before anything starts, DsvError if another run holds this checkout.
    """
    if jobs < 1:
        raise RequestError(f"--jobs: expected a whole number ≥ 1, got {jobs}")
    todo = plan(preset, only=only, device=device, data_root=data_root)
    if part is not None:
        todo = cut(todo, part)
    check_machine(todo)
    run_id = uuid.uuid4().hex
    with exclusive(run_id):
        with explain("write to", own_root()):  # what would fail in each notebook's last cell
            probe(own_root() / ".staging")
        stale = forget(todo, force=force)
        for job in todo if force else ():
            shutil.rmtree(jobs_home(job.directory), ignore_errors=True)
        for job in todo:
            if job not in stale:
                echo(f"{job.name} · up to date (--force runs it again)")
        if len(stale) > 1:
            echo(f"forecast: {total(map(expected, stale), jobs)}")
        if stale:
            threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or cores()) // jobs)
            asked: dict[str, Any] = {"preset": preset, "device": device, "data_root": data_root}
            asked |= {"threads": threads, "forgotten": True}
            try:
                schedule(stale, asked, run_id=run_id, cores=jobs * threads, echo=echo)
            finally:
                end_processes(run_id)
                for job in stale:
                    remove_staging(job)
        finish(preset, [job for job in todo if job.repetition is None], echo=echo)
    return all(done(job).is_file() for job in todo)


def finish(preset: str, jobs: Sequence[Job], *, echo: Callable[[str], object] = print) -> None:
    """Write the page of a preset's own runs, and say how they compare with the recorded ones."""
    whole = {job.notebook: (job.directory, job.recorded) for job in jobs if up_to_date(job)}
    text = compare_with_recorded(whole, own_root() / preset / "comparison.csv")
    page = write_wall(own_root() / preset, text)
    echo(f"figures: {os.path.relpath(page, repository_root())}")
    if text:
        echo(text)


def schedule(
    jobs: Sequence[Job],
    asked: dict[str, Any],
    *,
    run_id: str,
    cores: int,
    echo: Callable[[str], object],
) -> None:
    """Let Snakemake run `jobs` on that many cores with the configuration `asked`; echo its lines.

    The caller holds the checkout, so that Snakemake's own lock, which survives a kill, is not
    needed.
    """
    from tqdm import tqdm

    root = repository_root()
    snakefile = root / "Snakefile"
    if not snakefile.is_file():  # DSV_ROOT may name a folder with notebooks only
        snakefile = PACKAGE.parent / "Snakefile"
    if not snakefile.is_file():
        raise DsvError("expected the repository's Snakefile, found none; run in a git checkout")
    config, log = root / "build" / "graph.json", root / "build" / "snakemake.log"
    write_json(config, asked)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)]
    command += ["--directory", str(root), "--configfile", str(config), "--nolock"]
    command += ["--cores", str(cores), "--rerun-incomplete", "--keep-going"]
    targets = [os.path.relpath(done(job), root) for job in jobs]
    command += ["--prioritize", targets[0]]  # the quickstart: something to look at meanwhile
    command += ["--quiet", "host", "progress", "reason", "rules", "--"]  # "all" hides its errors
    command += targets
    env = child_environment(run_id) | {"PYTHONUNBUFFERED": "1"}
    names, ended = {job.name for job in jobs}, set()
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), leave=False, unit="notebook")
    with log.open("w", encoding="utf-8") as errors, bar:
        process: subprocess.Popen[str] = subprocess.Popen(
            command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        for line in map(str.rstrip, process.stdout or ()):
            name, _, rest = line.partition(" · ")
            if name in names:
                count = ""
                if rest.startswith(("done", "FAILED")):
                    ended.add(name)
                    bar.update()
                    count = f"[{len(ended)}/{len(jobs)}] "
                with tqdm.external_write_mode():
                    echo(count + line)
        status = process.wait()
    for job in jobs:
        if job.name not in ended:
            echo(
                f"{job.name} · FAILED: not started, snakemake ended with status {status}: "
                f"{_reason(log.read_text())}; log: {os.path.relpath(log, root)}"
            )


def _reason(log: str) -> str:
    """Return Snakemake's last error: the line that names it, and the two after it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [i for i, line in enumerate(lines) if re.match(r"\w*(Error|Exception)\b", line)]
    reason = " ".join(lines[named[-1] :][:3] if named else lines[-1:]) or "no message"
    if "No space left" in reason:
        reason += f" (temporary files go to {tempfile.gettempdir()}, which TMPDIR moves)"
    return reason
