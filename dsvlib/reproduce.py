"""Running notebooks under papermill: one process each, nothing trusted but its record.

plan (`dsvlib.presets`) → execute → verify the record → figure wall (`dsvlib.wall`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import yaml

from dsvlib.files import PACKAGE, atomic_path
from dsvlib.presets import Job, plan
from dsvlib.run import (
    DsvError,
    RecordError,
    RequestError,
    code_digest,
    digest,
    explain,
    figures_root,
    read_record,
    repository_root,
)
from dsvlib.wall import summary, write_wall


@dataclass
class _Running:
    job: Job
    run_id: str
    process: subprocess.Popen[bytes]
    position: str
    retried: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def reproduce(
    preset: str = "quick",
    *,
    only: Sequence[str] = (),
    jobs: int = 1,
    device: str | None = None,
    data_root: str | None = None,
    force: bool = False,
    echo: Callable[[str], object] = print,
) -> bool:
    """Run a preset's notebooks, `jobs` at a time, and rebuild its figure wall.

    Notebooks whose figures are whole and made by the same code and parameters are left alone
    unless `force`. Returns whether every notebook succeeded; the reasons have been echoed.
    Raises RequestError before anything starts, DsvError if another run holds this checkout.
    """
    if jobs < 1:
        raise RequestError(f"--jobs: expected a whole number ≥ 1, got {jobs}")
    todo = plan(preset, only=only, device=device, data_root=data_root)
    flags = [f"--device {device}" if device else "", "--data-root PATH" if data_root else ""]
    run_id = uuid.uuid4().hex
    failures: list[str] = []
    with exclusive(run_id), _stoppable():
        _check_writable()
        stale = [job for job in todo if force or not up_to_date(job)]
        for job in todo:
            if job not in stale:
                echo(f"{job.notebook} · up to date (--force runs it again)")
        try:
            for failure in _execute(stale, run_id, jobs, " ".join(filter(None, flags)), echo):
                failures.append(failure)
        finally:
            end_processes(run_id)
            for job in stale:
                _remove_staging(job)
        write_wall(preset)
    if values := summary([job.directory for job in todo]):
        echo(values)
    return not failures


def _check_writable() -> None:
    """Refuse now what would otherwise fail in each notebook's last cell."""
    probe = figures_root() / ".staging" / "probe"
    with explain("write to", figures_root()):
        with atomic_path(probe) as temporary:
            temporary.write_text("room for one block")
        probe.unlink()


def up_to_date(job: Job) -> bool:
    """Return whether this checkout ran the job with this code and these parameters, and whole.

    Committed figures are not enough: a fresh clone makes its own, which is what it is for.
    """
    if not job.build(".ipynb").is_file():
        return False
    try:
        record = read_record(job.directory)
    except RecordError:
        return False
    same = record["request"] == digest(job.parameters)
    return same and record["code"] == code_digest(job.notebook)


def expected_seconds(job: Job) -> float | None:
    """Return how long the job took last time, else what the preset says, else None."""
    with suppress(RecordError):
        return float(read_record(job.directory)["seconds"])
    return job.expected_s


def _execute(
    todo: Sequence[Job], run_id: str, jobs: int, flags: str, echo: Callable[[str], object]
) -> Iterator[str]:
    """Run the jobs and yield one message per failure."""
    from tqdm import tqdm

    def say(text: str) -> None:
        with tqdm.external_write_mode():
            echo(text)

    waiting = [(job, f"[{i}/{len(todo)}] {job.notebook}") for i, job in enumerate(todo, 1)]
    running: list[_Running] = []
    bar = tqdm(total=len(todo), disable=not sys.stderr.isatty(), leave=False, unit="notebook")
    with bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                job, position = waiting.pop(0)
                expected = expected_seconds(job)
                say(f"{position} · expected {_duration(expected) if expected else 'unknown'}")
                running.append(_start(job, f"{run_id}-{job.notebook}", position, jobs, flags))
            for run in list(running):
                if run.process.poll() is None and run.seconds < run.job.timeout_s:
                    continue
                running.remove(run)
                if not run.retried and _never_began(run):
                    say(f"{run.position} · the kernel did not start, trying once more")
                    again = _start(run.job, run.run_id, run.position, jobs, flags)
                    again.retried = True
                    running.append(again)
                    continue
                reason = _verdict(run)
                state = f"FAILED after {_duration(run.seconds)}: {reason}" if reason else ""
                say(f"{run.position} · {state or f'done in {_duration(run.seconds)}'}")
                bar.update()
                if reason:
                    yield reason
            bar.set_postfix_str(", ".join(f"{r.job.notebook} {r.seconds:.0f} s" for r in running))
            time.sleep(0.1)


def _start(job: Job, run_id: str, position: str, jobs: int, flags: str) -> _Running:
    """Start papermill on one notebook in a process group of its own."""
    root = repository_root()
    output, log, parameters = map(job.build, (".ipynb", ".log", ".parameters.yml"))
    log.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)  # what an earlier run left must not speak for this one
    parameters.write_text(yaml.safe_dump(job.parameters, allow_unicode=True), encoding="utf-8")
    command = f"dsv reproduce --preset {job.preset} --only {job.notebook} {flags}".strip()
    context = {"request": digest(job.parameters), "command": command, "started": time.time()}
    threads = str(max(1, int(os.environ.get("OMP_NUM_THREADS") or _cores()) // jobs))
    env = os.environ | {
        "DSV_RUN_ID": run_id,
        "DSV_RUN_CONTEXT": json.dumps(context),
        "DSV_ROOT": str(root),
        "DSV_FIGURES": str(figures_root().absolute()),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # threads that wait by spinning make a busy machine several times slower
        "OMP_WAIT_POLICY": "PASSIVE",
        "MPLBACKEND": "agg",
        "PYTHONHASHSEED": "0",
        "JUPYTER_PREFER_ENV_PATH": "1",
        # torch warns about its own use of torch.jit; it says nothing about the notebook
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.jit._script",
        # The kernel imports the very dsvlib that started it.
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *_python_path()]),
    }
    limit = str(max(1, round(job.timeout_s)))
    arguments = [sys.executable, "-m", "papermill", f"{root}/notebooks/{job.notebook}.ipynb"]
    arguments += [str(output), "-f", str(parameters), "--cwd", str(root / "notebooks")]
    arguments += ["-k", "python3", "--no-progress-bar", "--log-output"]
    arguments += ["--execution-timeout", limit, "--start-timeout", "60"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            arguments, cwd=root, env=env, stdout=stream, stderr=stream, start_new_session=True
        )
    return _Running(job, run_id, process, position)


def _cores() -> int:
    """Return the cores this process may use, which in a container are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _python_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def _never_began(run: _Running) -> bool:
    """Return whether papermill gave up before the first cell ran."""
    if run.process.poll() in (None, 0):
        return False
    cells = _executed_cells(run.job)
    return not any(cell.get("execution_count") or cell.get("outputs") for cell in cells)


def _executed_cells(job: Job) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError, KeyError):
        cells = json.loads(job.build(".ipynb").read_text(encoding="utf-8"))["cells"]
        return [cell for cell in cells if cell["cell_type"] == "code"]
    return []


def _verdict(run: _Running) -> str:
    """Return why the notebook failed, or an empty text: only its fresh record says it did not."""
    log = os.path.relpath(run.job.build(".log"), repository_root())
    status = run.process.poll()
    if status is None:
        end_processes(run.run_id)
        return f"no end after {_duration(run.job.timeout_s)}, its time limit; log: {log}"
    for cell in _executed_cells(run.job) if status else ():
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                first = next(iter("".join(cell["source"]).splitlines()), "")
                error = " ".join(str(output["evalue"]).split())
                return f"{output['ename']}: {error} (cell beginning '{first}'); log: {log}"
    if status:
        lines = run.job.build(".log").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"papermill ended with status {status}: {last}; log: {log}"
    try:
        fresh = read_record(run.job.directory)["run_id"] == run.run_id
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


def _remove_staging(job: Job) -> None:
    for left in (figures_root() / ".staging").glob(f"{job.preset}-{job.notebook}-*"):
        pid = int(left.name.rsplit("-", 1)[1])
        try:
            os.kill(pid, 0)  # a notebook that someone has open keeps its staging folder
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def exclusive(run_id: str) -> Iterator[None]:
    """Hold this checkout; the lock dies with its process, so that kill -9 leaves none behind.

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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DsvError(
                f"another dsv (process {pid}) is running in this checkout; wait for it or stop it"
            ) from None
        if earlier:  # its owner was killed; the kernels that it left behind would write here too
            end_processes(earlier)
        lock.truncate(0)
        lock.write(f"{os.getpid()} {run_id}")
        lock.flush()
        yield
        lock.truncate(0)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does, so that kernels end with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(f"signal {number}")

    earlier = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0)
    return " ".join(parts + [f"{rest} s"] * (rest > 0 or not parts))
