"""One notebook under papermill, in processes of its own; nothing is trusted but its record.

The order of many is Snakemake's (`companion.workflow`).
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from companion.presets import Job
from companion.runs import RecordError, code_digest, read_record, repository_root, write_json
from dsvlib._errors import DsvError
from dsvlib._files import PACKAGE
from dsvlib._progress import duration


def run_notebook(
    job: Job,
    *,
    threads: int | None = None,
    flags: str = "",
    run_id: str | None = None,
    echo: Callable[[str], object] = print,
) -> str:
    """Run one notebook to its end and return why it failed, or an empty text.

    `flags` are the options to repeat in the figures' command. Without the `run_id` of a run that
    holds this checkout, the checkout is shared with other notebooks of the graph and refused to
    whole runs meanwhile.
    """
    if run_id is None:
        run_id = uuid.uuid4().hex
        with exclusive(run_id, shared=True):
            try:
                return run_notebook(job, threads=threads, flags=flags, run_id=run_id, echo=echo)
            finally:
                end_processes(run_id)
                remove_staging(job)
    own_id = f"{run_id}-{job.name}"
    for retry in (True, False):
        began, status = time.monotonic(), None
        process = _start(job, own_id, threads or cores(), flags)
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(job.timeout_s)
        if not (retry and status and _never_began(job)):
            break
        echo(f"{job.name} · the kernel did not start, trying once more")
    reason = _verdict(job, own_id, status)
    word = "FAILED after" if reason else "done in"
    taken = duration(time.monotonic() - began)
    echo(f"{job.name} · {word} {taken}{': ' if reason else ''}{reason}")
    return reason


def _start(job: Job, run_id: str, threads: int, flags: str) -> subprocess.Popen[bytes]:
    """Start papermill on one notebook in a process group of its own."""
    root = repository_root()
    output, log, parameters = map(job.build, (".ipynb", ".log", ".parameters.yml"))
    log.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)  # what an earlier run left must not speak for this one
    parameters.write_text(yaml.safe_dump(job.parameters, allow_unicode=True), encoding="utf-8")
    context = {
        "directory": str(job.directory.relative_to(root)),
        "code": code_digest(job.notebook),
        "command": f"dsv reproduce --preset {job.preset} --only {job.notebook} {flags}".strip(),
        "started": time.time(),
    }
    env = child_environment(run_id) | {
        "DSV_RUN_CONTEXT": json.dumps(context),
        "DSV_ROOT": str(root),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # threads that wait by spinning make a busy machine several times slower
        "OMP_WAIT_POLICY": "PASSIVE",
        # glibc hands large blocks back at every step, and the kernel clears them anew
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "MPLBACKEND": "agg",
        "PYTHONHASHSEED": "0",
        "JUPYTER_PATH": _search_path(_own_kernel(), "JUPYTER_PATH"),
        # torch warns about its own use of torch.jit; it says nothing about the notebook
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.jit._script",
    }
    limit = str(max(1, round(job.timeout_s)))
    arguments = [sys.executable, "-m", "papermill", f"{root}/notebooks/{job.notebook}.ipynb"]
    arguments += [str(output), "-f", str(parameters), "--cwd", str(root / "notebooks")]
    arguments += ["-k", "python3", "--no-progress-bar", "--log-output"]
    arguments += ["--execution-timeout", limit, "--start-timeout", "60"]
    with log.open("wb") as stream:
        return subprocess.Popen(
            arguments, cwd=root, env=env, stdout=stream, stderr=stream, start_new_session=True
        )


def child_environment(run_id: str) -> dict[str, str]:
    """Return the environment of a process of a run: it imports the very dsvlib that started it."""
    own = {"DSV_RUN_ID": run_id, "PYTHONPATH": _search_path(PACKAGE.parent, "PYTHONPATH")}
    return os.environ | usable_home() | own


def usable_home() -> dict[str, str]:
    """Return environment variables that stand in for a home that is missing or cannot be written.

    Snakemake, Jupyter and matplotlib each want to write there, and to know the user's name, which
    under `docker -u` nobody has.
    """
    env = {}
    try:
        getpass.getuser()
    except (KeyError, OSError):  # KeyError before Python 3.13
        env["LOGNAME"] = f"user-{os.getuid()}"
    home = Path(os.path.expanduser("~"))  # Path.home() raises without a name
    if not (home.is_dir() and os.access(home, os.W_OK)):
        home = repository_root() / "build" / "home"
        home.mkdir(parents=True, exist_ok=True)
        env["HOME"] = str(home)
    return env


def _own_kernel() -> Path:
    """Return a folder for JUPYTER_PATH in which `python3` is the Python that runs this.

    Another one of that name, installed for the user or the system, would win otherwise.
    """
    home = repository_root() / "build" / "jupyter"
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    about = {"argv": arguments, "display_name": "Python 3", "language": "python"}
    write_json(home / "kernels" / "python3" / "kernel.json", about)
    return home


def _search_path(first: Path, name: str) -> str:
    return os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))


def cores() -> int:
    """Return the cores this process may use, which in a container are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _never_began(job: Job) -> bool:
    """Return whether papermill, which failed, gave up before the first cell ran."""
    cells = _executed_cells(job)
    return not any(cell.get("execution_count") or cell.get("outputs") for cell in cells)


def _executed_cells(job: Job) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError, KeyError):
        cells = json.loads(job.build(".ipynb").read_text(encoding="utf-8"))["cells"]
        return [cell for cell in cells if cell["cell_type"] == "code"]
    return []


def _verdict(job: Job, run_id: str, status: int | None) -> str:
    """Return why the notebook failed, or an empty text: only its fresh record says it did not.

    `status` is papermill's, None where it did not end in time.
    """
    log = os.path.relpath(job.build(".log"), repository_root())
    if status is None:
        end_processes(run_id)
        return f"no end after {duration(job.timeout_s)}, its time limit; log: {log}"
    for cell in _executed_cells(job) if status else ():
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                first = next(iter("".join(cell["source"]).splitlines()), "")
                error = " ".join(str(output["evalue"]).split())
                return f"{output['ename']}: {error} (cell beginning '{first}'); log: {log}"
    if status:
        lines = job.build(".log").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"papermill ended with status {status}: {last}; log: {log}"
    try:
        fresh = read_record(job.directory)["run_id"] == run_id
    except RecordError as error:
        return f"{error}; log: {log}"
    return "" if fresh else f"its last cell did not call run.complete(); log: {log}"


def end_processes(run_id: str) -> None:
    """End what carries this run's id in its environment: papermill, its kernel and their workers.

    Kernels live in sessions of their own, so that a signal to the process group misses them.
    """
    import psutil  # type: ignore[import-untyped]

    mine = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and (
                process.environ().get("DSV_RUN_ID", "").startswith(run_id)
            ):
                process.terminate()
                mine.append(process)
    for process in psutil.wait_procs(mine, timeout=3)[1]:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(mine, timeout=3)


def remove_staging(job: Job) -> None:
    """Remove what kernels that have died left half-made."""
    for left in (job.directory.parents[1] / ".staging").glob(f"{job.preset}-{job.notebook}-*"):
        pid = int(left.name.rsplit("-", 1)[1])
        try:
            os.kill(pid, 0)  # one that is alive keeps its staging folder
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def exclusive(run_id: str, *, shared: bool = False) -> Iterator[None]:
    """Hold this checkout; the lock dies with its process, so that kill -9 leaves none behind.

    `shared` lets other shared holders in, and keeps a whole run out.
    Raises DsvError if another process holds it, or where the system has no such locks.
    """
    try:
        import fcntl  # absent on Windows, where everything else here should still import
    except ImportError:
        raise DsvError(
            "running notebooks needs Linux or macOS (file locks and signals); on Windows use WSL"
        ) from None
    path = repository_root() / "build" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        lock.seek(0)
        pid, _, earlier = lock.read().partition(" ")
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            who = f"dsv (process {pid})" if pid else "dsv or snakemake"
            raise DsvError(
                f"another {who} is running in this checkout; wait for it or stop it"
            ) from None
        if shared:
            yield
            return
        if earlier:  # its owner was killed; the kernels that it left behind would write here too
            end_processes(earlier)
        lock.truncate(0)
        lock.write(f"{os.getpid()} {run_id}")
        lock.flush()
        yield
        lock.truncate(0)
