"""Presets, and running notebooks under papermill: one process each, nothing trusted but its record.

plan (presets and parameters, checked before any kernel starts) → execute → verify the record →
figure wall. `refresh_notebooks` and `check_notebooks` keep the outputs that are committed honest.
"""

from __future__ import annotations

import ast
import difflib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsvlib.files import PACKAGE, atomic_path
from dsvlib.run import (
    DsvError,
    RecordError,
    RequestError,
    code_cells,
    code_digest,
    digest,
    explain,
    figures_root,
    library_digest,
    read_record,
    repository_root,
)

COMMON = {"preset": ("str", "quick"), "seed": ("int", 0), "device": ("str", "auto")}
COMMON["data_root"] = ("str", "")
PRESET_KEYS = {"description", "timeout_s", "expected_s", "omit", "notebooks"}
MAX_CELL_LINES = 40
PROGRESS = re.compile(r"\d%\||\d(it|s)/(s|it)\b|\dit \[")
PRIVATE = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|private|mnt|opt|usr|var|work)/\S+")


# ------------------------------------------------------------------- parameters and presets


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: annotation and literal default."""

    annotation: ast.expr
    default: Any


@dataclass(frozen=True)
class Job:
    """One notebook with everything that decides its result."""

    notebook: str
    preset: str
    parameters: dict[str, Any]
    timeout_s: float
    expected_s: float | None

    @property
    def directory(self) -> Path:
        """Where the notebook publishes."""
        return figures_root() / self.preset / self.notebook

    def build(self, suffix: str) -> Path:
        """Return a by-product of the run, such as its log."""
        return repository_root() / "build" / self.preset / f"{self.notebook}{suffix}"


def _unknown(what: str, name: str, options: Iterable[str]) -> RequestError:
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
    return RequestError(f"unknown {what} {name!r}; {hint}")


def notebook_names() -> list[str]:
    """Return the names of all notebooks, ``NN_*``, in order."""
    folder = repository_root() / "notebooks"
    return sorted(path.stem for path in folder.glob("[0-9][0-9]_*.ipynb"))


def find_notebook(name: str) -> str:
    """Return the notebook called `name`, by its number or in full."""
    names = notebook_names()
    wanted = Path(name).name.removesuffix(".ipynb")
    number = wanted.zfill(2) + "_" if wanted.isdigit() else None
    found = [n for n in names if n == wanted or (number and n.startswith(number))]
    if not found:
        raise _unknown("notebook", name, names)
    return found[0]


def read_parameters(notebook: str) -> dict[str, Parameter]:
    """Return the parameters that a notebook takes.

    Raises DsvError unless one cell is tagged `parameters`, holds nothing but annotated literals
    that fit their annotation, and has the parameters common to all.
    """
    path = repository_root() / "notebooks" / f"{notebook}.ipynb"
    code_cells(path)  # one clear error for a file that is no notebook
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise DsvError(f"{notebook}: expected one cell tagged 'parameters', got {len(tagged)}")
    found = {}
    try:
        for line in ast.parse("".join(tagged[0]["source"])).body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                raise ValueError(f"line {line.lineno} is something else")
            default = ast.literal_eval(line.value) if line.value else None
            coerce(default, line.annotation)
            found[line.target.id] = Parameter(line.annotation, default)
    except (SyntaxError, ValueError) as error:
        raise DsvError(
            f"{notebook}: the parameters cell takes only lines like 'steps: int = 600'; {error}"
        ) from error
    for name, (annotation, default) in COMMON.items():
        have = found.get(name)
        if have is None or ast.unparse(have.annotation) != annotation or have.default != default:
            wanted = f"{name}: {annotation} = {json.dumps(default)}"
            raise DsvError(f"{notebook}: the parameters cell needs the line '{wanted}'")
    return found


def coerce(value: Any, annotation: ast.expr) -> Any:
    """Return `value` as the annotation wants it (an int becomes a float where one is expected).

    Raises ValueError if it does not fit: a bool is no number, text is never converted.
    """
    match annotation:
        case ast.Constant(value=None) if value is None:
            return None
        case ast.Constant(value=str(quoted)):
            return coerce(value, ast.parse(quoted, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            for option in (left, right):
                with suppress(ValueError):
                    return coerce(value, option)
        case ast.Subscript(value=ast.Name(id="list"), slice=inner) if isinstance(value, list):
            return [coerce(item, inner) for item in value]
        case ast.Name(id="float") if isinstance(value, int | float) and value is not True:
            if value is not False:
                return float(value)
        case ast.Name(id="int" | "bool" | "str" | "list" as name):
            if type(value).__name__ == name:
                return value
    raise ValueError(f"expected {ast.unparse(annotation)}, got {value!r}{_yaml_trap(value)}")


def _yaml_trap(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return f", which YAML reads as text; write {float(value):.1e} with a point and a sign"
    if isinstance(value, bool):
        return ", which YAML makes of yes, no, on and off; put quotes around text"
    return ""


def read_presets() -> dict[str, dict[str, Any]]:
    """Return all presets, every key and notebook name in them checked.

    Raises RequestError for a key or notebook that does not exist, DsvError for a broken file.
    """
    path = repository_root() / "notebooks" / "presets.yml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DsvError(f"presets.yml: expected a readable YAML file, got {reason}") from error
    presets = _mapping(content, "presets.yml")
    for key in presets:
        if key != "presets":
            raise _unknown("key of presets.yml", str(key), ["presets"])
    presets = _mapping(presets.get("presets"), "presets.yml: presets")
    return {str(name): _check_preset(str(name), preset) for name, preset in presets.items()}


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise DsvError(f"{where}: expected 'name: value' lines, got {value!r}")
    return value


def _check_preset(name: str, preset: Any) -> dict[str, Any]:
    where = f"presets.yml: {name}"
    checked: dict[str, Any] = {"description": "", "timeout_s": 900, **_mapping(preset, where)}
    for key in checked:
        if key not in PRESET_KEYS:
            raise _unknown(f"key of {where}", str(key), PRESET_KEYS)
    limit = checked["timeout_s"]
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0:
        raise DsvError(f"{where}: timeout_s: expected seconds > 0, got {limit!r}")
    for key in ("expected_s", "omit", "notebooks"):
        checked[key] = _mapping(checked.get(key) or {}, f"{where}: {key}")
        for notebook in checked[key]:
            if notebook not in notebook_names():
                raise _unknown(f"notebook in {where}: {key}:", str(notebook), notebook_names())
    return checked


def plan(
    preset: str = "quick",
    *,
    only: Sequence[str] = (),
    device: str | None = None,
    data_root: str | None = None,
) -> list[Job]:
    """Return the notebooks to run with their complete parameters; no kernel starts.

    Raises RequestError for anything asked for that does not exist or does not fit.
    """
    presets = read_presets()
    if preset not in presets:
        raise _unknown("preset", preset, presets)
    chosen, omitted = presets[preset], presets[preset]["omit"]
    names = list(dict.fromkeys(find_notebook(name) for name in only)) or notebook_names()
    if data_root is not None and not Path(data_root).is_dir():
        raise RequestError(f"--data-root: expected a folder, got {data_root!r}")
    common: dict[str, Any] = {"preset": preset}
    if device is not None:
        common["device"] = device
    if data_root is not None:
        common["data_root"] = str(Path(data_root).resolve())  # a kernel has its own folder
    jobs = []
    for name in names:
        if name in omitted and only:
            raise RequestError(f"{name} is not part of preset {preset!r}: {omitted[name]}")
        if name not in omitted:
            given = _mapping(chosen["notebooks"].get(name) or {}, f"presets.yml: {preset}: {name}")
            full = resolve(name, given, f"presets.yml: {preset}: {name}") | common
            job = Job(name, preset, full, chosen["timeout_s"], chosen["expected_s"].get(name))
            jobs.append(job)
    if not jobs:
        raise RequestError(
            f"preset {preset!r} has no notebooks here; expected notebooks/NN_*.ipynb"
        )
    return jobs


def resolve(notebook: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a notebook's defaults overlaid with `given`, each name and type checked."""
    known = read_parameters(notebook)
    full = {name: coerce(p.default, p.annotation) for name, p in known.items()}
    for name, value in given.items():
        if name not in known:
            raise _unknown(f"parameter in {where}:", str(name), known)
        try:
            full[name] = coerce(value, known[name].annotation)
        except ValueError as error:
            raise RequestError(f"{where}: {name}: {error}") from error
    return full


# -------------------------------------------------------------------------------- execution


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
    with _exclusive(run_id), _stoppable():
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
    """Return whether the job's figures are whole and of this code and these parameters."""
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
        "MPLBACKEND": "agg",
        "PYTHONHASHSEED": "0",
        "JUPYTER_PREFER_ENV_PATH": "1",
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
def _exclusive(run_id: str) -> Iterator[None]:
    """Hold this checkout; the lock dies with its process, so that kill -9 leaves none behind."""
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


# ------------------------------------------------------------------- figure wall and summary


def _measured(value: Mapping[str, Any]) -> str:
    spread = "" if value["std"] is None else f" ± {value['std']:.3g}"
    return f"{value['value']:.4g}{spread}{value['unit'] and ' ' + value['unit']}"


def summary(directories: Iterable[Path]) -> str:
    """Return the values recorded by whole runs, one line each."""
    rows = []
    for directory in directories:
        with suppress(RecordError):
            for value in read_record(directory)["values"]:
                paper = "" if value["paper"] is None else f"paper {value['paper']:.4g}"
                rows.append((value["claim"], value["name"], _measured(value), paper))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def write_wall(preset: str) -> Path:
    """Write ``figures/<preset>/README.md``, a wall of its figures made from the sidecars alone."""
    folder = figures_root() / preset
    parts = [f"# Figures: {preset}", "", f"Made by `dsv reproduce --preset {preset}`.", ""]
    for directory in sorted(p for p in folder.glob("*") if p.is_dir()):
        parts += [f"## {directory.name}", ""]
        try:
            record = read_record(directory)
        except RecordError as error:
            parts += [f"*No complete run: {error}*", ""]
            continue
        sidecars = [name for name in sorted(record["files"]) if name.endswith(".json")]
        for name in sidecars:
            parts += _wall_entry(directory, json.loads((directory / name).read_text("utf-8")))
        if record["values"]:
            parts += ["| claim | quantity | value | n | paper |", "|---|---|---|---|---|"]
            for v in record["values"]:
                paper = "" if v["paper"] is None else f"{v['paper']:.4g}"
                cells = (v["claim"], v["name"], _measured(v), str(v["n"]), paper)
                parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
            parts.append("")
    path = folder / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return path


def _wall_entry(directory: Path, sidecar: Mapping[str, Any]) -> list[str]:
    stem = f"{directory.name}/{sidecar['name']}"
    links = [f"[{Path(n).suffix[1:]}]({directory.name}/{n})" for n in sidecar["files"]]
    links = [link for link in links if not link.startswith("[png]")]
    links.append(f"[how it was made]({stem}.json)")
    alt = " ".join(sidecar["alt"].split()).replace("[", "(").replace("]", ")")
    picture = [f"![{alt}]({stem}.png)", ""] if sidecar["kind"] == "figure" else []
    title = sidecar["caption"] or sidecar["name"]
    text = f"**{sidecar['scale']}** · {title} · {' · '.join(links)}"
    return [*picture, text, "", f"`{sidecar['command']}`", ""]


# ------------------------------------------------------- committed notebooks: refresh, check


def refresh_notebooks(preset: str = "quick", only: Sequence[str] = ()) -> list[str]:
    """Put the outputs of a preset's run, normalised, into the committed notebooks.

    Returns the names refreshed. Raises DsvError, before writing any, if a notebook has no run
    of the present code.
    """
    import nbformat

    ready = []
    with _exclusive(uuid.uuid4().hex):
        for job in plan(preset, only=only):
            if not up_to_date(job) or not job.build(".ipynb").is_file():
                fix = f"run dsv reproduce --preset {preset} --only {job.notebook} --force"
                raise DsvError(f"{job.notebook}: no outputs of the present code to take; {fix}")
            target = repository_root() / "notebooks" / f"{job.notebook}.ipynb"
            executed = nbformat.read(job.build(".ipynb"), as_version=4)
            ready.append((target, normalise(executed, target)))
        for target, notebook in ready:
            with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8") as out:
                nbformat.write(notebook, out)
    return [target.stem for target, _ in ready]


def normalise(executed: Any, source: Path) -> Any:
    """Strip from an executed notebook what differs between two equal runs.

    That is papermill's own cell and metadata, times, paths, progress lines and a second copy of
    each picture as SVG.
    """
    executed.cells = [
        cell
        for cell in executed.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    executed.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "dsvlib": {"cells": digest(code_cells(source)), "library": library_digest()},
    }
    number = 0
    for cell in executed.cells:
        for key in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill adds an empty list
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            cell.outputs = [o for o in map(_normalise_output, cell.outputs) if o is not None]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = number
    return executed


def _normalise_output(output: Any) -> Any:
    """Return the output without progress, private paths and addresses; None if nothing is left."""
    if output.output_type == "stream":
        lines = output.text.splitlines(keepends=True)
        if output.name == "stderr":
            lines = [line for line in lines if not PROGRESS.search(line)]
        output.text = _without_paths("".join(lines))
        return output if output.text.strip() else None
    if "data" in output:
        for kind in list(output.data):
            if kind == "image/svg+xml" or "widget" in kind:
                del output.data[kind]
            elif isinstance(output.data[kind], str) and kind.startswith("text/"):
                output.data[kind] = _without_paths(output.data[kind])
        return output if output.data else None
    return output


def _without_paths(text: str) -> str:
    text = text.replace(f"{repository_root()}{os.sep}", "").replace(str(repository_root()), ".")
    text = re.sub(r"/\S*/site-packages/", "site-packages/", text)
    return re.sub(r"\bat 0x[0-9a-f]+", "at 0x…", text.replace(str(Path.home()), "~"))


def check_notebooks() -> list[str]:
    """Return what is wrong with the committed notebooks and the presets, one sentence each."""
    import nbformat

    problems = []
    for name in notebook_names():
        path = repository_root() / "notebooks" / f"{name}.ipynb"
        try:
            read_parameters(name)
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
        except (DsvError, nbformat.ValidationError, nbformat.reader.NotJSONError) as error:
            problems.append(str(error).split("\n")[0])
            continue
        problems += [f"{name}: {problem}" for problem in _check_notebook(path, notebook)]
    try:
        for preset, content in read_presets().items():
            if not set(notebook_names()) <= set(content["omit"]):
                plan(preset)
    except DsvError as error:
        if str(error) not in problems:
            problems.append(str(error))
    return problems


def _check_notebook(path: Path, notebook: Any) -> Iterator[str]:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    wanted = {"cells": digest(code_cells(path)), "library": library_digest()}
    if notebook.metadata.get("dsvlib") != wanted:
        yield "its outputs are not of the present code; run dsv reproduce, dsv notebooks refresh"
    if "papermill" in notebook.metadata or len(code) != len(code_cells(path)):
        yield "papermill's cell or metadata is in it; run dsv notebooks refresh"
    if not any(".complete()" in cell.source for cell in code[-1:]):
        yield "expected the last code cell to call run.complete()"
    for index, cell in enumerate(notebook.cells):
        where = f"cell {index}"
        if cell.cell_type != "code":
            continue
        lines = len(cell.source.splitlines())
        if lines > MAX_CELL_LINES:
            yield f"{where} has {lines} lines; expected at most {MAX_CELL_LINES}, move code out"
        for output in cell.outputs:
            yield from (f"{where} {problem}" for problem in _check_output(output))


def _check_output(output: Any) -> Iterator[str]:
    if output.output_type == "error":
        yield f"ends in {output.ename}"
    data = output.get("data", {})
    texts = [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]
    for text in texts:
        if found := PRIVATE.search(str(text)):
            yield f"shows the path {found.group()}; paths differ between machines"
    if "image/svg+xml" in data:
        yield "shows an SVG; expected PNG only"
    if "image/png" in data and not output.metadata.get("image/png", {}).get("alt"):
        yield "shows an image without alt text; end the cell with run.save_figure(…)"
