"""Two places: what a run of one's own made never changes what is recorded, until a maintainer does.

Each test works in a small git checkout.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from checkout import (
    make_checkout,
    publish,
    publish_at,
    whole_run,
    write_notebook,
    write_presets,
)
from matplotlib.figure import Figure
from PIL import Image

from companion import cli, figures, recording
from companion.ledger.claims import claim_rows
from companion.ledger.results import results
from companion.notebooks import refresh_notebooks
from companion.presets import plan
from companion.recording import record
from companion.runs import RecordError, Run, copy_recorded, digest, read_record
from companion.workflow import done, finish, reproduce, up_to_date
from dsvlib._errors import DsvError, RequestError
from dsvlib._files import PACKAGE, file_digest


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_checkout(tmp_path, monkeypatch)
    monkeypatch.setattr(
        recording, "refresh_notebooks", lambda *_, **__: []
    )  # its own tests are elsewhere
    (tmp_path / ".gitignore").write_text("build/\n.snakemake/\n")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit(root: Path) -> None:
    git(root, "add", ".")
    git(root, "commit", "-q", "--allow-empty", "-m", "x")


def test_a_run_with_another_machines_numbers_leaves_everything_recorded(checkout: Path) -> None:
    (job,) = plan()
    publish_at(job.recorded, steps=5)
    commit(checkout)
    before = results("quick"), claim_rows("quick"), read_record(job.recorded)
    publish(job, steps=77)
    said: list[str] = []
    finish("quick", [job], echo=said.append)
    assert "0 of 1 recorded values repeated" in "\n".join(said)
    with pytest.raises(SystemExit):
        cli.main(["claims"])
    with pytest.raises(SystemExit):
        cli.main(["claims", "--own"])
    assert (results("quick"), claim_rows("quick"), read_record(job.recorded)) == before
    assert git(checkout, "status", "--porcelain") == ""


def test_what_is_run_by_hand_replaces_neither(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = plan()
    publish_at(job.recorded, steps=5)
    publish(job, steps=6)
    own, recorded = read_record(job.directory), read_record(job.recorded)
    run = Run.start("01_line", preset="quick", seed=0, parameters={"steps": 8})
    run.record("K1", "steps", 8)
    run.complete()
    assert run.directory == checkout / "build" / "by-hand" / "quick" / "01_line"
    assert (read_record(job.directory), read_record(job.recorded)) == (own, recorded)
    assert up_to_date(job)
    assert read_record(run.directory)["by_hand"] is True
    for place in ("figures", "build/runs", "build/runs/seeds/3"):
        monkeypatch.setenv("DSV_FIGURES", str(checkout / place))
        with pytest.raises(DsvError, match="DSV_FIGURES: expected a folder outside"):
            Run.start("01_line", preset="quick", seed=0)


def test_a_whole_run_may_not_call_itself_another(checkout: Path) -> None:
    with whole_run(plan()[0].directory), pytest.raises(ValueError, match="being run, got quick/02"):
        Run.start("02_more", preset="quick", seed=0)


def test_recording_copies_pictures_tables_and_records(checkout: Path) -> None:
    (job,) = plan()
    publish(job)
    said: list[str] = []
    record(echo=said.append)
    assert said == ["1 runs of preset quick recorded; look at git diff, then commit"]
    changed = git(checkout, "status", "--porcelain", "-uall").split("\n")
    assert {line[3:] for line in changed if line} == {
        "data/results/quick.csv",
        "data/results/quick.json",
        "figures/claims/quick.csv",
        "figures/claims/quick.md",
        "figures/quick/01_line/record.json",
        "figures/quick/README.md",
    }
    assert read_record(job.recorded)["values"] == read_record(job.directory)["values"]
    commit(checkout)
    record(echo=said.append)
    assert git(checkout, "status", "--porcelain") == "", "recording again changes nothing"


def test_notebooks_take_the_outputs_of_the_run_that_is_recorded(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "refresh_notebooks", refresh_notebooks)
    photos = str(checkout / "build" / "photos")
    Path(photos).mkdir(parents=True)
    commit(checkout)
    (job,) = plan(data_root=photos)
    publish(job)
    shutil.copyfile(checkout / "notebooks" / "01_line.ipynb", job.build(".ipynb"))
    record(data_root=photos, echo=lambda _: None)
    commit(checkout)
    with pytest.raises(DsvError, match="expected a whole run here"):
        record(echo=lambda _: None)


def test_of_a_repetition_its_values_alone_are_recorded(checkout: Path) -> None:
    write_presets(checkout, quick={"description": "all", "repeat": {"01_line": [100]}})
    commit(checkout)
    first, again = plan()
    for job in (first, again):
        with whole_run(job.directory):
            run = Run.start("01_line", preset="quick", seed=job.parameters["seed"])
            run.save_figure(Figure((1, 1)), "line", alt="An empty figure.")
            run.record("K1", "steps", 5.0 + job.parameters["seed"])
            run.complete()
        nbformat.write(nbformat.v4.new_notebook(), job.build(".ipynb"))
        done(job).touch()
    record(echo=lambda _: None)
    assert (first.recorded / "line.png").is_file()
    assert [path.name for path in again.recorded.iterdir()] == ["record.json"]
    kept = read_record(again.recorded)
    assert (kept["values"][0]["value"], kept["files"]) == (105, {})
    assert {"line.png", "line.json"} <= kept["unpublished"].keys()
    row = next(csv.DictReader(results("quick")[0].splitlines()))
    assert (float(row["value"]), row["seeds"]) == (55, "0 100")


def test_recording_fills_the_numbers_in_the_text(checkout: Path) -> None:
    (checkout / "README.md").write_text("took 0<!-- quick K1 steps :.0f --> steps\n")
    commit(checkout)
    (job,) = plan()
    publish(job, steps=7)
    said: list[str] = []
    record(echo=said.append)
    assert (checkout / "README.md").read_text() == "took 7<!-- quick K1 steps :.0f --> steps\n"
    assert said[1:] == ["numbers in the text changed: README.md; do the sentences still hold?"]
    (checkout / "README.md").write_text("took 7<!-- quick K1 stops :.0f --> steps\n")
    commit(checkout)
    publish(job, steps=8)
    with pytest.raises(DsvError, match="no record holds it; correct its name"):
        record(echo=said.append)
    assert read_record(job.recorded)["values"][0]["value"] == 8, "what was recorded stays so"


def test_recording_refuses_what_is_not_clean_whole_and_of_this_code(checkout: Path) -> None:
    (job,) = plan()
    with pytest.raises(DsvError, match=r"01_line: expected a whole run here by the present code"):
        record()
    (checkout / "note").write_text("changed")
    publish(job)
    with pytest.raises(DsvError, match="recording needs a clean commit"):
        record()
    commit(checkout)
    with pytest.raises(DsvError, match="expected a run from a clean commit, got one from changed"):
        record()
    publish(job)
    with pytest.raises(DsvError, match="found none"):
        record(device="cuda")
    write_notebook(checkout, "01_line", "pass")
    commit(checkout)
    with pytest.raises(DsvError, match="found none"):
        record()
    with pytest.raises(RequestError, match="a smoke run is no result"):
        record("smoke")
    assert not (checkout / "figures").exists()


def test_what_is_not_committed_keeps_its_name_and_digest(checkout: Path) -> None:
    (job,) = plan()
    with whole_run(job.directory):
        run = Run.start("01_line", preset="quick", seed=0)
    fig = Figure(figsize=(2, 1))
    fig.add_subplot().plot([0, 1])
    run.save_figure(fig, "line", alt="A line that rises", data={"pixels": np.zeros(3)})
    run.complete()
    made = read_record(job.directory)
    for target in (job.recorded, job.recorded):  # a second time changes nothing
        copy_recorded(job.directory, target)
    copy_recorded(job.recorded, job.recorded)  # nor does copying in place
    kept = read_record(job.recorded)
    assert {path.name for path in job.recorded.iterdir()} == {
        "line.png",
        "line.json",
        "record.json",
    }
    assert kept["unpublished"] == {name: made["files"][name] for name in ("line.svg", "line.npz")}
    sidecar = json.loads((job.recorded / "line.json").read_text())
    assert list(sidecar["files"]) == ["line.png"]
    assert set(sidecar["unpublished"]) == {"line.svg", "line.npz"}
    (job.recorded / "line.png").write_bytes(b"?")
    with pytest.raises(RecordError, match=r"line\.png was changed"):
        read_record(job.recorded)


def test_a_record_copied_from_elsewhere_is_refused(checkout: Path) -> None:
    (job,) = plan()
    publish(job)
    other = job.directory.with_name("02_more")
    job.directory.rename(other)
    with pytest.raises(RecordError, match=r"record\.json is that of quick/01_line"):
        read_record(other)


@pytest.mark.parametrize(
    ("key", "crafted"),
    [
        ("files", {"<b>.png": "0"}),
        ("files", {"../../line.png": "0"}),
        ("files", {"line.<b>": "0"}),
        ("seed", "<script>"),
        ("preset", "<b>"),
        ("scale", ["<b>"]),
        ("values", [{"claim": "K1", "name": "<b>", "value": 1.0}]),
        ("values", [{"claim": "K1", "name": "x", "value": "<b>"}]),
        ("values", [{"claim": "K1", "name": "x", "value": 1.0, "seeds": ["<b>"]}]),
        ("values", [{"claim": "K1", "name": "x", "value": 1.0, "more": "<b>"}]),
        ("values", "<b>"),
    ],
)
def test_a_crafted_record_is_refused_even_with_its_digest_right(
    checkout: Path, key: str, crafted: object
) -> None:
    (job,) = plan()
    publish(job)
    path = job.directory / "record.json"
    changed = json.loads(path.read_text()) | {key: crafted}
    del changed["digest"]
    path.write_text(json.dumps(changed | {"digest": digest(changed)}))
    with pytest.raises(RecordError, match=r"record\.json holds what no run writes"):
        read_record(job.directory)


@pytest.mark.slow
def test_a_real_run_is_recorded_with_its_outputs_and_nothing_is_left_to_do(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "refresh_notebooks", refresh_notebooks)
    assert reproduce(echo=lambda _: None)
    assert git(checkout, "status", "--porcelain") == ""
    record(echo=lambda _: None)
    changed = {line[3:] for line in git(checkout, "status", "--porcelain", "-uall").splitlines()}
    assert "notebooks/01_line.ipynb" in changed
    assert "figures/quick/01_line/line.png" in changed
    assert "figures/quick/01_line/line.svg" not in changed
    commit(checkout)
    said: list[str] = []
    assert reproduce(echo=said.append)
    assert "up to date" in said[0], "outputs are no code"
    assert "1 of 1 recorded values repeated within their spread" in said[-1]
    assert git(checkout, "status", "--porcelain") == ""


@pytest.mark.slow
def test_papermill_by_hand_with_other_parameters_replaces_neither(checkout: Path) -> None:
    (job,) = plan()
    publish_at(job.recorded, steps=5)
    publish(job, steps=6)
    own, recorded = read_record(job.directory), read_record(job.recorded)
    source = checkout / "notebooks" / "01_line.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(checkout / "build/out.ipynb")]
    subprocess.run(
        [*command, "-p", "steps", "8", "--cwd", str(source.parent)],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert (read_record(job.directory), read_record(job.recorded)) == (own, recorded)
    made = read_record(checkout / "build" / "by-hand" / "quick" / "01_line")
    assert (made["parameters"]["steps"], made["by_hand"]) == (8, True)
    assert made["scale"] == "digits · quick · run by hand"


def test_large_photographs_are_made_smaller_and_the_record_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "quick" / "01_line"
    with whole_run(folder):
        run = Run.start("01_line", preset="quick", seed=0)
        noise = np.random.default_rng(0).random((18, 3, 24, 24))
        fig = figures.image_grid(noise, columns=6, smooth=True, tile=0.7)
        run.save_figure(fig, "photos", alt="Eighteen squares of noise.", caption="Noise.")
        run.complete()
    monkeypatch.setattr(recording, "LARGE", 90_000)
    own = (folder / "photos.png").read_bytes()
    kept = tmp_path / "recorded" / "quick" / "01_line"
    copy_recorded(folder, kept, recording._shrink)
    assert (folder / "photos.png").read_bytes() == own, "the run itself stays as it is"
    assert (kept / "photos.png").stat().st_size < min(len(own) / 2, 120_000)
    with Image.open(kept / "photos.png") as picture:
        assert picture.width in recording.WIDTHS["RGB"]
        assert picture.mode == "P", "noise stays too large: few colours, dithered"
        assert picture.text["Description"] == "Eighteen squares of noise."  # type: ignore[attr-defined]
    digest = file_digest(kept / "photos.png")
    assert read_record(kept)["files"]["photos.png"] == digest
    assert json.loads((kept / "photos.json").read_text())["files"]["photos.png"] == digest
    changed = (kept / "photos.png").read_bytes()
    recording._shrink(kept / "photos.png")  # nothing more to do
    assert (kept / "photos.png").read_bytes() == changed
