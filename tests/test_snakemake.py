"""Snakemake runs the notebooks: side by side, and after every way of dying it ends the same.

Dry-runs show what the profiles ask for. Those marked slow start kernels and kill them.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import BODY, END, PARAMETERS, publish, write_notebook, write_presets

from companion import workflow
from companion.ledger.results import read_run, values_of
from companion.presets import plan
from companion.runs import read_record
from companion.workflow import done, forget, reproduce, up_to_date
from dsvlib._errors import DsvError
from dsvlib._files import PACKAGE

TABLE = """
import pandas as pd
run.save_table(pd.DataFrame({"x": range(steps)}), "numbers")
"""


pytestmark = pytest.mark.usefixtures("checkout")


def snakemake(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PACKAGE.parent / "Snakefile")]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [*command, "--directory", str(root), *words],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_other_images_under_the_same_path_make_a_run_stale(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = checkout / "pets" / "train" / "cat" / "1.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"one")
    parameters = f'dataset: str = "folder:{checkout / "pets"}"'
    write_notebook(checkout, "01_line", BODY, END, parameters=f"{PARAMETERS}\n{parameters}")
    (job,) = plan()
    publish(job)
    assert up_to_date(job)
    picture.write_bytes(b"two")
    workflow._images.cache_clear()  # another process would look anew
    assert not up_to_date(job)
    picture.write_bytes(b"one")
    workflow._images.cache_clear()
    assert up_to_date(job), "a copy with other file times is the same data"


@pytest.mark.parametrize(("profile", "threads"), [("slurm", ""), ("kubernetes", "2")])
def test_profile_plans_the_notebooks_and_the_comparison(
    checkout: Path, profile: str, threads: str
) -> None:
    write_notebook(checkout, "02_more", END)
    publish(plan()[0])
    done = snakemake(checkout, "-n", "--profile", str(PACKAGE.parent / "profiles" / profile))
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert re.search(r"^notebook +1$", said, re.MULTILINE), said
    assert re.search(r"^comparison +1$", said, re.MULTILINE)
    assert "mem_mb=4096" in said
    assert not threads or f"threads: {threads}" in said
    assert not re.search(r"^checkpoint ", said, re.MULTILINE), "shipped ones are not trained anew"


def test_outputs_follow_digests_and_not_times(checkout: Path) -> None:
    write_notebook(checkout, "02_more", END)
    jobs = plan()
    folder = publish(jobs[0])
    assert forget(jobs) == jobs[1:]
    assert done(jobs[0]).is_file()
    os.utime(checkout / "notebooks" / "01_line.ipynb")  # as a checkout does
    assert forget(jobs) == jobs[1:]
    assert forget(jobs, force=True) == jobs
    assert not done(jobs[0]).exists()
    publish(jobs[0])
    (folder / "line.csv").write_text("x")  # not of the record
    assert forget(jobs) == jobs[1:]
    (folder / "record.json").write_text("{")
    assert forget(jobs) == jobs
    assert not done(jobs[0]).exists()


def test_code_changed_and_changed_back_runs_again(checkout: Path) -> None:
    """What stands there after A, B is of B: going back to A is no reason to take it for A's."""
    (job,) = plan()
    publish(job)
    write_notebook(checkout, "01_line", BODY, "pass", END)
    forget([job])
    publish(job)
    write_notebook(checkout, "01_line", BODY, END)
    assert forget([job]) == [job]


def test_without_a_snakefile_is_one_sentence(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "PACKAGE", checkout / "elsewhere" / "dsvlib")
    with pytest.raises(DsvError, match="Snakefile, found none"):
        reproduce(echo=lambda _: None)


def test_snakemake_that_does_not_start_is_reported(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "Snakefile").write_text("raise WorkflowError('no such luck')\n")
    said: list[str] = []
    assert not reproduce(echo=said.append)
    assert "01_line · FAILED: not started, snakemake ended with status 1" in said[0]
    assert "no such luck" in said[0]
    assert "log: build/snakemake.log" in said[0]


@pytest.mark.slow
def test_two_run_side_by_side_with_divided_threads(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    shown = 'import os, time; print("threads", os.environ["OMP_NUM_THREADS"])'
    for name in ("01_line", "02_more"):
        body = BODY.replace("01_line", name)
        meet = f"""
from pathlib import Path
Path("../{name}.here").touch()
while not all(Path(f"../{{other}}.here").exists() for other in ("01_line", "02_more")):
    time.sleep(0.1)
"""
        write_notebook(checkout, name, shown, meet, body, END)  # each waits for the other
    write_presets(checkout, quick={"timeout_s": 200})
    said: list[str] = []
    assert reproduce(jobs=2, echo=said.append), said
    assert sum("· done in" in line for line in said) == 2
    for job in plan():
        assert "threads 2" in job.build(".ipynb").read_text()
    assert reproduce(jobs=2, echo=said.append)
    assert sum("up to date" in line for line in said) == 2


@pytest.mark.slow
def test_plain_snakemake_runs_and_compares_and_then_does_nothing(checkout: Path) -> None:
    done = snakemake(checkout, "--cores", "2", "--config", "preset=smoke")
    assert done.returncode == 0, done.stderr
    assert "01_line · done in" in done.stdout
    assert read_record(checkout / "build" / "runs" / "smoke" / "01_line")
    assert (checkout / "build" / "runs" / "smoke" / "README.md").is_file()
    assert not (checkout / "figures").exists()
    again = snakemake(checkout, "--cores", "2", "--config", "preset=smoke")
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout + again.stderr


@pytest.mark.slow
def test_a_repeated_notebook_runs_at_every_seed(checkout: Path) -> None:
    body = BODY.replace("steps, paper", "steps + seed, paper")
    write_notebook(checkout, "01_line", body, END)
    write_presets(checkout, quick={"repeat": {"01_line": [100, 200]}})
    said: list[str] = []
    assert reproduce(jobs=2, echo=said.append), said
    assert any("01_line.seed-100 · done in" in line for line in said)
    first, *others = plan()
    records = [read_record(job.directory) for job in (first, *others)]
    assert [record["seed"] for record in records] == [0, 100, 200]
    value, *_ = values_of(read_run(first.directory))
    assert (value.std, value.n, value.seeds) == (100.0, 3, (0, 100, 200))
    assert '<a href="../seeds/100/quick/01_line">seed 100</a>' in (
        first.directory.with_name("README.md").read_text(encoding="utf-8")
    )
    assert forget(plan()) == []
    shutil.rmtree(others[0].directory)
    assert forget(plan()) == others[:1], "one seed that is missing runs alone"


@pytest.mark.slow
def test_killed_five_times_at_random_it_ends_in_the_same_tables(checkout: Path) -> None:
    steps = [f"import time; time.sleep(0.3)  # {i}" for i in range(5)]
    write_notebook(checkout, "01_line", BODY, *steps, TABLE, END)
    write_notebook(checkout, "02_more", BODY.replace("01_line", "02_more"), TABLE, *steps, END)
    assert reproduce(jobs=2, echo=lambda _: None)
    folders = [job.directory for job in plan()]
    names = ("numbers.csv", "line.png")
    expected = [(f / name).read_bytes() for f in folders for name in names]
    shutil.rmtree(checkout / "build")
    command = [sys.executable, "-m", "companion.cli", "reproduce", "--jobs", "2"]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    draw = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # past the start, into the run
        time.sleep(draw.uniform(0, 15))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        for folder in folders:  # a record that is there stands for whole files
            assert not (folder / "record.json").exists() or read_record(folder)
    assert reproduce(jobs=2, echo=lambda _: None)
    assert [(f / name).read_bytes() for f in folders for name in names] == expected


@pytest.mark.slow
def test_full_disk_fails_in_a_sentence_and_the_next_run_goes_on(checkout: Path) -> None:
    folder = plan()[0].directory
    assert reproduce(echo=lambda _: None)
    before = read_record(folder)
    full = "from dsvlib import _files\ndef no(*_): raise OSError(28, 'No space left on device')\n"
    write_notebook(checkout, "01_line", full + "_files.os.fsync = no", BODY, END)
    said: list[str] = []
    assert not reproduce(echo=said.append)
    assert any("No space left on device; free space" in line for line in said), said
    assert read_record(folder) == before
    write_notebook(checkout, "01_line", BODY, TABLE, END)
    assert reproduce(echo=said.append)
    assert "numbers.csv" in read_record(folder)["files"]
