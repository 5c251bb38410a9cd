"""Running notebooks: trusted only for a fresh and whole record, and nothing left running.

What a kernel's end means is tested with stand-ins for papermill and a plain loop for Snakemake; one
test starts both for real, and those marked slow start many and kill some.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from checkout import (
    BODY,
    END,
    PARAMETERS,
    publish,
    publish_at,
    write_notebook,
    write_presets,
)

from companion import execution
from companion import workflow as module
from companion.forecast import expected
from companion.presets import Job, plan
from companion.runs import jobs_home, read_record
from companion.workflow import done, reproduce, up_to_date
from dsvlib._errors import DsvError, RequestError
from dsvlib._files import PACKAGE

pytestmark = pytest.mark.usefixtures("checkout")


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(execution, "_start", refuse)
    monkeypatch.setattr(module, "schedule", refuse)


@pytest.mark.usefixtures("no_kernel")
def test_wrong_request_is_refused_before_a_kernel_starts(checkout: Path) -> None:
    with pytest.raises(RequestError, match="--jobs"):
        reproduce(jobs=0)
    write_presets(checkout, smoke={"notebooks": {"01_line": {"stepz": 2}}})
    with pytest.raises(RequestError, match="did you mean 'steps'"):
        reproduce("smoke")
    assert not (checkout / "build").exists()


@pytest.mark.usefixtures("no_kernel")
def test_what_this_machine_lacks_is_said_before_a_kernel_starts(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(RequestError, match="torch sees 0 GPUs here"):
        reproduce(device="cuda")
    dataset = 'dataset: str = "imagenette-64"'
    write_notebook(checkout, "01_line", END, parameters=f"{PARAMETERS}\n{dataset}")
    (empty := checkout / "empty").mkdir()
    with pytest.raises(RequestError, match="needs the images of imagenette-64; missing: copy"):
        reproduce(data_root=str(empty))
    with pytest.raises(RequestError, match="--data-root: expected a folder, got ''"):
        reproduce(data_root="")
    assert not (checkout / "build").exists()


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    assert execution.usable_home() == {}
    monkeypatch.setattr("getpass.getuser", nobody)
    assert list(execution.usable_home()) == ["LOGNAME"]


@pytest.mark.usefixtures("no_kernel")
def test_second_run_in_one_checkout_stops(checkout: Path) -> None:
    (checkout / "build").mkdir()
    with (checkout / "build" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("123 abc")
        lock.flush()
        with pytest.raises(DsvError, match=r"another dsv \(process 123\)"):
            reproduce()


def test_unwritable_figures_folder_stops_before_a_kernel(checkout: Path, no_kernel: None) -> None:
    (checkout / "build").mkdir()
    (checkout / "build" / "runs").write_text("a file")
    with pytest.raises(DsvError, match="cannot write to"):
        reproduce()


@pytest.mark.usefixtures("no_kernel")
def test_system_without_file_locks_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with pytest.raises(DsvError, match="on Windows use WSL"):
        reproduce()


def test_up_to_date_follows_parameters_code_and_files(checkout: Path) -> None:
    (job,), (other,) = plan(), plan(device="cpu")
    assert not up_to_date(job)
    folder = publish(job)
    assert up_to_date(job)
    assert not up_to_date(other)
    assert expected(job).seconds == pytest.approx(70, abs=5)
    write_notebook(checkout, "01_line", BODY, "pass", END)
    assert not up_to_date(job)
    write_notebook(checkout, "01_line", BODY, END)
    assert up_to_date(job)
    job.build(".ipynb").unlink()
    assert not up_to_date(job), "figures that came with the clone are made again"
    publish(job)
    assert up_to_date(job)
    (folder / "record.json").unlink()
    assert not up_to_date(job)


@pytest.mark.usefixtures("no_kernel")
def test_nothing_to_do_rebuilds_the_wall_only(checkout: Path) -> None:
    publish(plan()[0])
    said: list[str] = []
    assert reproduce(echo=said.append)
    assert "up to date" in said[0]
    assert said[1:] == ["figures: build/runs/quick/index.html", "not compared: 01, no recorded run"]
    assert (checkout / "build" / "runs" / "quick" / "README.md").is_file()


@pytest.fixture
def papermill(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let `act(job, run_id)` stand in for the kernel and `command` for papermill's end.

    Returns the list of the ids that were started.
    """

    def stand_in(
        act: Callable[[Job, str], object] = lambda *_: None, command: str = "exit 0"
    ) -> list[str]:
        ids: list[str] = []

        def start(job: Job, run_id: str, *_: object) -> subprocess.Popen[bytes]:
            ids.append(run_id)
            log = job.build(".log")
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("Executing: 0%\nthe last words\n\n")
            act(job, run_id)
            env = os.environ | {"DSV_RUN_ID": run_id}
            return subprocess.Popen(["sh", "-c", command], env=env, start_new_session=True)

        def loop(
            jobs: list[Job], _: object, *, run_id: str, echo: Callable[[str], object], **__: object
        ) -> None:
            for job in jobs:
                module.run_job(job, run_id=run_id, echo=echo)

        monkeypatch.setattr(execution, "_start", start)
        monkeypatch.setattr(module, "schedule", loop)
        return ids

    return stand_in


def executed(job: Job, *outputs: Any) -> None:
    """Leave the notebook that papermill writes, its first code cell run and the next one failed."""
    path = Path(os.environ["DSV_ROOT"]) / "notebooks" / f"{job.notebook}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].execution_count = 1
    notebook.cells[2].outputs = list(outputs)
    nbformat.write(notebook, job.build(".ipynb"))


def test_failed_cell_is_quoted_and_earlier_figures_stay_whole(
    checkout: Path, papermill: Callable[..., list[str]]
) -> None:
    folder = publish(plan()[0])
    before = read_record(folder)
    write_notebook(checkout, "01_line", "missing = 1 / 0\nmore = 2", END)
    failure = nbformat.v4.new_output(
        "error", ename="ZeroDivisionError", evalue="division\nby zero", traceback=[]
    )
    ids = papermill(lambda job, _: executed(job, failure), "exit 1")
    said: list[str] = []
    assert not reproduce(echo=said.append)
    assert len(ids) == 1, "a cell has run: a second try would be a second run"
    assert "FAILED after" in said[1]
    assert "ZeroDivisionError: division by zero (cell beginning 'missing = 1 / 0')" in said[1]
    assert "log: build/runs/quick/01_line.log" in said[1]
    assert read_record(folder) == before


def test_kernel_that_did_not_start_is_tried_once_more(
    papermill: Callable[..., list[str]],
) -> None:
    ids = papermill(command="exit 3")
    said: list[str] = []
    assert not reproduce(echo=said.append)
    assert len(ids) == 2
    assert "did not start, trying once more" in said[1]
    assert "papermill ended with status 3: the last words" in said[2]


def test_only_a_fresh_and_whole_record_counts(
    checkout: Path, papermill: Callable[..., list[str]]
) -> None:
    said: list[str] = []
    papermill(executed_only := lambda job, _: executed(job))
    assert not reproduce(echo=said.append)
    assert any("record.json is missing" in line for line in said)
    publish(plan()[0])
    papermill(executed_only)
    said.clear()
    assert not reproduce(force=True, echo=said.append)
    assert "its last cell did not call run.complete()" in said[1]
    write_notebook(checkout, "02_more", END)
    papermill(lambda job, run_id: publish(job, run_id if job.notebook == "02_more" else "old"))
    said.clear()
    assert not reproduce(force=True, jobs=2, echo=said.append)
    assert any("02_more · done" in line for line in said), "one failure stops no other"
    assert not done(plan()[0]).exists()
    papermill(publish)
    assert reproduce(force=True, echo=said.append)


def test_time_limit_ends_the_processes(checkout: Path, papermill: Callable[..., list[str]]) -> None:
    write_presets(checkout, quick={"timeout_s": 0.2})
    papermill(command="sleep 600")
    said: list[str] = []
    assert not reproduce(echo=said.append)
    assert "its time limit; log: build/runs/quick/01_line.log" in said[1]
    assert not _left_over(checkout)


def test_staging_of_a_dead_process_is_removed_and_of_a_living_one_kept(
    checkout: Path, papermill: Callable[..., list[str]]
) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    staging = checkout / "build" / "runs" / ".staging"
    for pid in (dead.pid, os.getppid()):
        (staging / f"quick-01_line-{pid}").mkdir(parents=True)
    papermill(publish)
    assert reproduce(echo=lambda _: None)
    assert [path.name for path in staging.iterdir()] == [f"quick-01_line-{os.getppid()}"]


def test_force_takes_up_nothing(checkout: Path, papermill: Callable[..., list[str]]) -> None:
    seen: list[bool] = []
    kept = jobs_home(plan()[0].directory) / "abc"
    papermill(lambda *_: seen.append(kept.is_dir()), command="exit 1")
    for force in (False, True):
        kept.mkdir(parents=True, exist_ok=True)
        assert not reproduce(force=force, echo=lambda _: None)
    assert seen[0]
    assert not any(seen[-2:]), "a kernel that does not start is tried twice"


def test_kernel_runs_and_publishes_also_in_a_poor_environment(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No home, no name, odd letters in the folder of the data, another kernel called python3."""
    other = checkout / "jupyter" / "kernels" / "python3" / "kernel.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"argv": ["false"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(checkout / "jupyter"))
    monkeypatch.setenv("HOME", "/proc/nowhere")
    (data := checkout / "da{ta} $x").mkdir()
    said: list[str] = []
    assert reproduce("smoke", data_root=str(data), echo=said.append), said
    assert said[1].startswith("[1/1] 01_line · done in ")
    assert said[0] == "01_line · expected unknown: no recorded run"
    record = read_record(checkout / "build" / "runs" / "smoke" / "01_line")
    assert record["parameters"] == {"steps": 2, "rate": 0.1}
    assert record["command"] == "dsv reproduce --preset smoke --only 01_line --data-root PATH"
    wall = (checkout / "build" / "runs" / "smoke" / "README.md").read_text()
    assert '<img src="01_line/line.png" alt="A straight line that rises"' in wall
    assert "<td>K1</td><td>steps</td><td>2</td><td>1</td><td>7</td>" in wall
    assert list((checkout / "build" / "runs" / ".staging").iterdir()) == []
    assert not _left_over(checkout)


@pytest.mark.slow
def test_notebook_without_complete_fails_and_others_go_on(checkout: Path) -> None:
    write_notebook(checkout, "01_line", BODY)
    second = BODY.replace("01_line", "02_more")
    write_notebook(checkout, "02_more", second, END)
    said: list[str] = []
    assert not reproduce("quick", jobs=2, echo=said.append)
    assert any("did not call run.complete()" in line or "missing" in line for line in said)
    assert read_record(plan(only=["02"])[0].directory)["parameters"]["steps"] == 5


@pytest.mark.slow
def test_dead_kernel_and_endless_notebook_fail(checkout: Path) -> None:
    write_notebook(checkout, "01_line", "import os; os._exit(1)", END)
    said: list[str] = []
    assert not reproduce(echo=said.append)
    assert "FAILED" in said[1]
    write_notebook(checkout, "01_line", BODY, "missing = 1 / 0", END)
    assert not reproduce(echo=said.append)
    assert any("ZeroDivisionError: division by zero (cell beginning 'mi" in line for line in said)
    write_notebook(checkout, "01_line", "import time; time.sleep(600)", END)
    write_presets(checkout, quick={"timeout_s": 6})
    assert not reproduce(echo=said.append)
    assert any("time limit" in line or "Timeout" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_leaves_figures_whole_and_no_process(
    checkout: Path, number: signal.Signals
) -> None:
    assert reproduce(echo=lambda _: None)
    folder = checkout / "build" / "runs" / "quick" / "01_line"
    before = read_record(folder)
    write_notebook(checkout, "01_line", BODY, "import time; time.sleep(600)", END)
    command = [sys.executable, "-m", "companion.cli", "reproduce"]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    staging = checkout / "build" / "runs" / ".staging"
    for _ in range(600):
        if list(staging.glob("quick-01_line-*/line.json")):
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode != 0
    assert read_record(folder) == before
    if number is not signal.SIGKILL:
        assert process.returncode == 130
        assert message.strip() == "dsv: interrupted; figures published earlier are as they were"
    else:  # nobody could clean up: the next run does
        write_notebook(checkout, "01_line", BODY, END)
        assert reproduce(echo=lambda _: None, force=True)
    assert list(staging.iterdir()) == []
    assert not _left_over(checkout)


def _left_over(checkout: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if "DSV_RUN_ID" in environment and environment.get("DSV_ROOT") == str(checkout):
            found.append(process.pid)
    return found


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("moment", ["before", "during", "published", "noting", "after"])
def test_interrupted_at_any_moment_only_a_finished_run_counts(
    checkout: Path,
    papermill: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    committed: bool,
) -> None:
    write_notebook(checkout, "02_more", END)
    first, second = plan()
    if committed:
        publish_at(first.recorded)
        publish_at(second.recorded)

    def act(job: Job, run_id: str) -> None:
        if job == second and moment == "before":
            raise KeyboardInterrupt
        executed(job)  # half of the notebook, as papermill saves it after each cell
        if job == second and moment == "during":
            raise KeyboardInterrupt
        publish(job, run_id)
        if job == second and moment == "published":
            raise KeyboardInterrupt

    papermill(act)
    if moment in ("noting", "after"):
        real = module.atomic_path

        def dying(path: Path) -> Any:
            if path == done(second) and moment == "noting":
                raise KeyboardInterrupt
            if path.name == "README.md":
                raise KeyboardInterrupt
            return real(path)

        monkeypatch.setattr(module, "atomic_path", dying)
        monkeypatch.setattr("companion.ledger.figure_wall.atomic_path", dying)
    with pytest.raises(KeyboardInterrupt):
        reproduce(echo=lambda _: None)
    assert up_to_date(first)
    assert up_to_date(second) == (moment == "after")
