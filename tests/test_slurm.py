"""The SLURM profile, for real: notebooks are jobs, and their ends and troubles are heard of.

Those marked slurm make this machine a SLURM of one node and take it down again; as root, where the
packages slurm-wlm and munge are (`make test-slurm`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from checkout import BODY, END, write_notebook

from companion import slurm
from companion.presets import plan
from companion.runs import read_record
from companion.slurm import tell_waiting, waiting
from companion.workflow import up_to_date
from dsvlib._files import PACKAGE

ROOT = PACKAGE.parent


@pytest.fixture(scope="module")
def one_node() -> Iterator[None]:
    script = Path(__file__).with_name("one_node_slurm.sh")
    started = subprocess.run([script, "start"], stderr=subprocess.PIPE, text=True, check=False)
    assert started.returncode == 0, started.stderr
    try:
        yield
    finally:
        subprocess.run([script, "stop"], check=True)


@contextmanager
def submitted(checkout: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Let Snakemake run with the profile in a checkout; what it says is in its file `said`."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(checkout), "--profile", str(ROOT / "profiles" / "slurm")]
    with (checkout / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, *words, "--config", "preset=smoke"],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slurm
@pytest.mark.usefixtures("one_node")
def test_a_notebook_runs_as_a_job_and_its_end_is_noticed(checkout: Path) -> None:
    shown = 'import os; print("as job", os.environ["SLURM_JOB_ID"])'
    write_notebook(checkout, "01_line", shown, BODY, END)
    with submitted(checkout) as process:
        process.wait(timeout=600)
    said = (checkout / "said").read_text()
    assert process.returncode == 0, said
    (number,) = re.findall(r"submitted with SLURM jobid (\d+)", said)
    (job,) = plan("smoke")
    assert f"as job {number}" in job.build(".ipynb").read_text()
    assert read_record(job.directory)["preset"] == "smoke"
    assert up_to_date(job)
    about = output("scontrol", "show", "job", number)
    assert "JobState=COMPLETED" in about
    ended = datetime.fromisoformat(re.findall(r"EndTime=(\S+)", about)[0])
    (noticed,) = re.findall(r"\[(.*)\]\nFinished jobid: \d+ \(Rule: notebook\)", said)
    waited = datetime.strptime(noticed, "%a %b %d %H:%M:%S %Y") - ended
    assert waited.total_seconds() < 120, said


@pytest.mark.slurm
@pytest.mark.usefixtures("one_node")
def test_a_job_that_can_never_start_says_what_the_queue_says(checkout: Path) -> None:
    cores = (os.cpu_count() or 1) + 2
    said, deadline = "", time.monotonic() + 120
    with submitted(checkout, "--set-threads", f"notebook={cores}") as process:
        while "says" not in said and process.poll() is None and time.monotonic() < deadline:
            time.sleep(1)
            said = (checkout / "said").read_text()
    assert re.search(rf"SLURM job \d+ \(cores: {cores}, .* the queue says PartitionConfig", said)
    assert output("squeue", "--noheader") == "", "Ctrl-C leaves nothing in the queue"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a squeue first in the path that repeats the file which is returned."""
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {tmp_path / 'queue'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return tmp_path / "queue"


def test_of_waiting_jobs_those_of_this_checkout_that_lack_more_than_a_turn_are_named(
    queue: Path, tmp_path: Path
) -> None:
    queue.write_text(
        f"3|PartitionConfig|4|4G|gpu|{tmp_path}\n"
        f"4|Priority|2|4G|gpu|{tmp_path}\n"
        "5|PartitionConfig|64|4G|gpu|/elsewhere\n"
        f"6|ReqNodeNotAvail, UnavailableNodes:n1|2|4G|gpu|{tmp_path}\n"
    )
    first, second = waiting(tmp_path) or ()
    assert first == (
        "SLURM job 3 (cores: 4, memory: 4G, partition gpu) waits, and not for its turn: "
        "the queue says PartitionConfig"
    )
    assert second.endswith("the queue says ReqNodeNotAvail, UnavailableNodes:n1")


def test_a_reason_is_told_once_and_nothing_without_slurm(
    queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.write_text(f"3|PartitionConfig|4|4G|gpu|{tmp_path}\n")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.setattr(slurm, "sleep", pause)
    told: list[str] = []
    tell_waiting(tmp_path, told.append, every_s=7)
    assert (len(told), pauses) == (1, [7, 7])
