"""Running notebooks under papermill: one process each, nothing trusted but its record.

plan (`companion.presets`) → graph (`companion.graph`: Snakemake decides the order) → one notebook
(`run_notebook`: execute, verify the record) → figure wall and claim ledger.
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
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from companion.graph import mark, request, schedule, stamp
from companion.ledger.claims import write_claims
from companion.ledger.figure_wall import summary, write_wall
from companion.ledger.results import write_results
from companion.presets import Job, plan
from companion.runs import RecordError, figures_root, read_record, repository_root
from dsvlib._errors import DsvError, RequestError, explain
from dsvlib._files import PACKAGE, atomic_path


@dataclass
class _Running:
    job: Job
    run_id: str
    process: subprocess.Popen[bytes]
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
    """Run a preset's notebooks, `jobs` at a time, and rebuild its figure wall and claim ledger.

    Notebooks whose figures are whole and made by the same code and parameters are left alone
    unless `force`. Returns whether every notebook succeeded; the reasons have been echoed.
    Raises RequestError before anything starts, DsvError if another run holds this checkout.
    """
    if jobs < 1:
        raise RequestError(f"--jobs: expected a whole number ≥ 1, got {jobs}")
    todo = plan(preset, only=only, device=device, data_root=data_root)
    run_id = uuid.uuid4().hex
    with exclusive(run_id), _stoppable():
        _check_writable()
        stale = mark(todo, force=force)
        for job in todo:
            if job not in stale:
                echo(f"{job.name} · up to date (--force runs it again)")
        if len(stale) > 1:
            known = [s for s in map(expected_seconds, stale) if s]
            rest = f", {len(stale) - len(known)} unknown" if len(known) < len(stale) else ""
            echo(f"forecast: {duration(sum(known) / jobs)} for {len(stale)} runs{rest}")
        if stale:
            threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or _cores()) // jobs)
            try:
                schedule(
                    stale,
                    run_id=run_id,
                    jobs_at_once=jobs,
                    threads=threads,
                    device=device,
                    data_root=data_root,
                    echo=echo,
                )
            finally:
                end_processes(run_id)
                for job in stale:
                    _remove_staging(job)
        write_wall(figures_root() / preset)
        if preset != "smoke":  # which is no result
            try:
                write_claims(preset)
                write_results(preset)
            except RecordError as error:
                echo(f"no claim ledger: {error}")
    if values := summary([job.directory for job in todo if job.repetition is None]):
        echo(values)
    return all(stamp(job).is_file() for job in todo)


def _check_writable() -> None:
    """Refuse now what would otherwise fail in each notebook's last cell."""
    probe = figures_root() / ".staging" / "probe"
    with explain("write to", figures_root()):
        with atomic_path(probe) as temporary:
            temporary.write_text("room for one block")
        probe.unlink()


def expected_seconds(job: Job) -> float | None:
    """Return what the job took last time, or its notebook, else what the preset says, else None."""
    record = last_record(job)
    return float(record["seconds"]) if record else job.expected_s


def last_record(job: Job) -> dict[str, Any] | None:
    """Return the job's record, or that of the run which it repeats, or None without either."""
    for run in (job, replace(job, repetition=None)):
        with suppress(RecordError):
            return read_record(run.directory)
    return None


def run_notebook(
    job: Job,
    *,
    threads: int | None = None,
    flags: str = "",
    run_id: str | None = None,
    echo: Callable[[str], object] = print,
) -> str:
    """Run one notebook to its end and return why it failed, or an empty text.

    What a rule of the graph calls. `flags` are the options to repeat in the figures' command.
    Without the `run_id` of a run that holds this checkout, the checkout is shared with other
    notebooks of the graph and refused to whole runs meanwhile.
    """
    if run_id is None:
        run_id = uuid.uuid4().hex
        with exclusive(run_id, shared=True), _stoppable():
            try:
                return run_notebook(job, threads=threads, flags=flags, run_id=run_id, echo=echo)
            finally:
                end_processes(run_id)
                _remove_staging(job)
    stamp(job).unlink(missing_ok=True)
    expected = expected_seconds(job)
    echo(f"{job.name} · expected {duration(expected) if expected else 'unknown'}")
    for retry in (True, False):
        run = _start(job, f"{run_id}-{job.name}", threads or _cores(), flags)
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(job.timeout_s)
        if not (retry and _never_began(run)):
            break
        echo(f"{job.name} · the kernel did not start, trying once more")
    reason = _verdict(run)
    if reason:
        echo(f"{job.name} · FAILED after {duration(run.seconds)}: {reason}")
    else:
        with atomic_path(stamp(job)) as temporary:
            temporary.write_text(read_record(job.directory)["finished"] + "\n", encoding="utf-8")
        echo(f"{job.name} · done in {duration(run.seconds)}")
    return reason


def _start(job: Job, run_id: str, threads: int, flags: str) -> _Running:
    """Start papermill on one notebook in a process group of its own."""
    root = repository_root()
    output, log, parameters = map(job.build, (".ipynb", ".log", ".parameters.yml"))
    log.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)  # what an earlier run left must not speak for this one
    parameters.write_text(yaml.safe_dump(job.parameters, allow_unicode=True), encoding="utf-8")
    command = f"dsv reproduce --preset {job.preset} --only {job.notebook} {flags}".strip()
    context = {"request": request(job), "command": command, "started": time.time()}
    env = os.environ | {
        "DSV_RUN_ID": run_id,
        "DSV_RUN_CONTEXT": json.dumps(context),
        "DSV_ROOT": str(root),
        "DSV_FIGURES": str(job.figures.absolute()),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
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
    return _Running(job, run_id, process)


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
        return f"no end after {duration(run.job.timeout_s)}, its time limit; log: {log}"
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
    for left in (job.figures / ".staging").glob(f"{job.preset}-{job.notebook}-*"):
        pid = int(left.name.rsplit("-", 1)[1])
        try:
            os.kill(pid, 0)  # a notebook that someone has open keeps its staging folder
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


def duration(seconds: float) -> str:
    """Return a time as people say it, such as ``2 min 5 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0)
    return " ".join(parts + [f"{rest} s"] * (rest > 0 or not parts))
