"""The graph: classifiers → notebooks → claim ledger → site, scheduled by Snakemake (``Snakefile``).

Digests decide what is out of date, not file times, which a checkout or a copy changes. A stamp,
``build/<preset>/<job>.done``, stands exactly where a job is up to date: it is what
Snakemake sees. Figures and records are no outputs in its sense, since Snakemake deletes outputs
before a rule runs and after it failed, and what was published earlier has to stay whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from companion.data_needs import data_sets
from companion.presets import Job
from companion.runs import (
    RecordError,
    digest,
    is_current,
    read_record,
    repository_root,
    result_sources,
    write_json,
)
from dsvlib._errors import DsvError
from dsvlib._files import PACKAGE, atomic_path, downloads_folder
from dsvlib.data.downloads import FOLDERS, folder_digest


def up_to_date(job: Job) -> bool:
    """Return whether this checkout ran the job whole, with this code, these parameters and images.

    Committed figures are not enough: a fresh clone makes its own, which is what it is for. Nor are
    outputs older than the figures, which then came from another checkout.
    """
    try:
        executed = json.loads(job.build(".ipynb").read_text(encoding="utf-8"))
        record = read_record(job.directory)
    except (OSError, ValueError, RecordError):
        return False
    ended = executed["metadata"].get("papermill", {}).get("end_time") or record["finished"]
    if record["finished"][:19] > ended[:19]:  # both UTC, to the second
        return False
    return record["request"] == request(job) and is_current(record)


def request(job: Job) -> str:
    """Return the digest of the job's parameters and of the folders of images that they name.

    Other data sets are bundled or come with a published checksum, so that their name is enough.
    """
    root = Path(job.parameters.get("data_root") or downloads_folder())
    folders = {
        name: root / name if name in FOLDERS else Path(name.removeprefix("folder:"))
        for name in data_sets(job.parameters)
        if name in FOLDERS or name.startswith("folder:")
    }
    images = {name: _images(path) for name, path in folders.items() if path.is_dir()}
    return digest([job.parameters, images] if images else job.parameters)


@cache  # once a process: a set of 60,000 images takes seconds
def _images(folder: Path) -> str:
    return folder_digest(folder)[1]


def stamp(job: Job) -> Path:
    """Return the file that says to Snakemake that the job is up to date."""
    return job.build(".done")


def mark(jobs: Iterable[Job], *, force: bool = False) -> list[Job]:
    """Put a stamp where a job is up to date, take it away elsewhere; return the stale jobs."""
    stale = []
    for job in jobs:
        if force or not up_to_date(job):
            stamp(job).unlink(missing_ok=True)
            stale.append(job)
        elif not stamp(job).is_file():
            with atomic_path(stamp(job)) as temporary:
                temporary.write_text("found up to date\n", encoding="utf-8")
    return stale


def sources() -> list[str]:
    """Return the files of dsvlib that can change a number, and the lock."""
    found = result_sources()
    lock = repository_root() / "requirements.lock"
    return [os.path.relpath(p, repository_root()) for p in (*found, lock) if p.is_file()]


def schedule(
    jobs: Sequence[Job],
    *,
    run_id: str,
    jobs_at_once: int,
    threads: int,
    device: str | None,
    data_root: str | None,
    echo: Callable[[str], object],
) -> None:
    """Let Snakemake run `jobs`, `jobs_at_once` at a time with `threads` each, and echo its lines.

    A job that failed has no stamp afterwards. The caller holds the checkout, so that Snakemake's
    own lock, which survives a kill, is not needed.
    """
    from tqdm import tqdm

    root = repository_root()
    snakefile = root / "Snakefile"
    if not snakefile.is_file():  # DSV_ROOT may name a folder with notebooks only
        snakefile = PACKAGE.parent / "Snakefile"
    if not snakefile.is_file():
        raise DsvError("expected the repository's Snakefile, found none; run in a git checkout")
    config, log = root / "build" / "graph.json", root / "build" / "snakemake.log"
    asked = {"preset": jobs[0].preset, "device": device, "data_root": data_root}
    write_json(config, asked | {"threads": threads, "marked": True})
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)]
    command += ["--directory", str(root), "--configfile", str(config), "--nolock"]
    command += ["--cores", str(jobs_at_once * threads), "--rerun-incomplete", "--keep-going"]
    command += ["--rerun-triggers", "mtime", "--quiet", "all", "--"]
    command += [os.path.relpath(stamp(job), root) for job in jobs]
    env = os.environ | {
        "DSV_RUN_ID": run_id,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    position = {job.name: f"[{i}/{len(jobs)}] " for i, job in enumerate(jobs, 1)}
    heard: set[str] = set()
    bar = tqdm(total=len(jobs), disable=not sys.stderr.isatty(), leave=False, unit="notebook")
    with log.open("w", encoding="utf-8") as errors, bar:
        process: subprocess.Popen[str] = subprocess.Popen(
            command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        for line in process.stdout or ():
            name, _, rest = line.rstrip().partition(" · ")
            if name in position:
                with tqdm.external_write_mode():
                    echo(f"{position[name]}{line.rstrip()}")
                heard.add(name)
                bar.update(rest.startswith(("done", "FAILED")))
        status = process.wait()
    for job in jobs:
        if job.name not in heard and not stamp(job).is_file():
            last = [line.strip() for line in log.read_text().splitlines() if line.strip()]
            reason = last[-1] if last else "no message"
            echo(
                f"{position[job.name]}{job.name} · FAILED: not started, snakemake ended "
                f"with status {status}: {reason}; log: {os.path.relpath(log, root)}"
            )


def options(config: dict[str, Any]) -> list[str]:
    """Return the options of `dsv notebooks run` that a configuration of the graph asks for."""
    words = []
    for key in ("device", "data_root"):
        if config.get(key):
            words += [f"--{key.replace('_', '-')}", str(config[key])]
    return words


def which(job: Job) -> list[str]:
    """Return the words of `dsv notebooks run` that name the job: its notebook, and its seed."""
    seed = [] if job.repetition is None else ["--seed", str(job.repetition)]
    return [job.notebook, *seed]
