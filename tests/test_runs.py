"""A run is published whole or not at all, and what was changed afterwards is noticed."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkout import whole_run
from matplotlib.figure import Figure
from PIL import Image

import dsvlib
from companion import runs as run_module
from companion.runs import RecordError, Run, code_digest, is_current, read_record, repository_root
from dsvlib._errors import DsvError
from dsvlib.support_set import SupportSet

ALT = "A straight line that rises from zero to one"


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DSV_FIGURES", "DSV_RUN_ID", "DSV_RUN_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DSV_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    cell = {"cell_type": "code", "source": "x = 1", "metadata": {}, "outputs": []}
    text = json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    (tmp_path / "notebooks" / "01_line.ipynb").write_text(text)
    return tmp_path


def line(slope: float = 1.0) -> Figure:
    fig = Figure(figsize=(3, 2))
    fig.add_subplot().plot([0, 1], [0, slope])
    return fig


def start(**options: object) -> Run:
    settings = {"preset": "quick", "seed": 3, "parameters": {"steps": 5, "data_root": "/x"}}
    return Run.start("01_line", **(settings | options))  # type: ignore[arg-type]


def publish(slope: float = 1.0) -> Run:
    run = start(data_digest="abc")
    frame = pd.DataFrame({"x": [0, 1], "y": [0, slope]})
    run.save_figure(line(slope), "line", alt=ALT, data=frame, caption="A line")
    run.save_table(frame, "numbers", caption="Its numbers")
    run.record("K1", "slope", np.float32(slope), std=0.1, seeds=range(3), paper=2.0)
    run.complete()
    return run


def test_complete_run_is_published_and_described(checkout: Path) -> None:
    folder = publish().directory
    record = read_record(folder)
    names = {"line.png", "line.svg", "line.csv", "line.json", "numbers.csv", "numbers.json"}
    assert set(record["files"]) == names
    assert {path.name for path in folder.iterdir()} == names | {"record.json"}
    assert record["values"][0]["seeds"] == [0, 1, 2]
    assert record["values"][0]["n"] == 3
    sidecar = json.loads((folder / "line.json").read_text())
    assert sidecar["alt"] == ALT
    assert sidecar["scale"] == "digits · quick · run by hand"
    assert sidecar["command"] == "notebooks/01_line.ipynb, run by hand"
    assert sidecar["parameters"] == {"steps": 5}  # where the data lie is private
    assert {"commit", "dirty", "data_digest", "seed", "environment"} <= set(sidecar)
    assert str(checkout) not in json.dumps(record)
    assert list((checkout / "build" / "by-hand" / ".staging").iterdir()) == []


def test_nothing_is_published_before_complete(checkout: Path) -> None:
    run = start()
    run.save_figure(line(), "line", alt=ALT)
    assert not run.directory.exists()


def test_saved_figure_shows_its_picture_with_alt_text() -> None:
    data, metadata = start().save_figure(line(), "line", alt=ALT)._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert metadata["image/png"]["alt"] == ALT
    with Image.open(io.BytesIO(data["image/png"])) as png:
        expected = png.width * 96 / 160  # the size in which its labels are as large as the text
    assert metadata["image/png"]["width"] == pytest.approx(expected, abs=1)


def test_second_run_removes_what_the_first_alone_had() -> None:
    folder = publish().directory
    run = start()
    run.save_figure(line(), "other", alt=ALT, data={"pixels": np.zeros((2, 2))})
    run.complete()
    assert {p.suffix for p in folder.iterdir() if p.stem == "other"} == {
        ".png",
        ".svg",
        ".npz",
        ".json",
    }
    assert not list(folder.glob("line.*"))
    assert read_record(folder)["values"] == []


@pytest.mark.parametrize("name", ["line.png", "line.csv", "line.json", "record.json"])
def test_changed_file_is_noticed(name: str) -> None:
    folder = publish().directory
    path = folder / name
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"value": 1.0', b'"value": 9.0') if "rec" in name else b"?")
    assert path.read_bytes() != text
    with pytest.raises(RecordError, match=rf"{name} was changed.*dsv reproduce"):
        read_record(folder)


def test_missing_file_and_missing_or_broken_record_are_noticed() -> None:
    folder = publish().directory
    (folder / "line.svg").unlink()
    with pytest.raises(RecordError, match=r"line\.svg is missing"):
        read_record(folder)
    (folder / "record.json").write_text("{")
    with pytest.raises(RecordError, match="cannot be read"):
        read_record(folder)
    (folder / "record.json").unlink()
    with pytest.raises(RecordError, match=r"record\.json is missing"):
        read_record(folder)


@pytest.mark.parametrize("survived", [0, 1, 3, 6])
def test_publish_killed_half_way_is_never_taken_for_whole(
    survived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(slope=1.0).directory
    real, moved = os.replace, []

    def dying(source: Path, target: Path) -> None:
        if Path(target).parent == folder:
            if len(moved) == survived:
                raise KeyboardInterrupt
            moved.append(target)
        real(source, target)

    monkeypatch.setattr(run_module.os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        publish(slope=2.0)
    with pytest.raises(RecordError, match=r"record\.json is missing"):
        read_record(folder)


def test_published_samples_can_be_loaded_and_their_file_is_watched() -> None:
    run = start()
    samples = SupportSet(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), torch.ones(2))
    assert run.save_samples(samples, "pair", caption="two of them") is samples
    run.complete()
    path = run.directory / "pair.safetensors"
    torch.testing.assert_close(SupportSet.load(path).inputs, samples.inputs, rtol=0, atol=0)
    assert json.loads((run.directory / "pair.json").read_text())["kind"] == "samples"
    path.write_bytes(b"?")
    with pytest.raises(RecordError, match=r"pair\.safetensors was changed"):
        read_record(run.directory)


def test_full_disk_leaves_the_earlier_figures_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish().directory
    before = read_record(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "write_json", full)
    with pytest.raises(DsvError, match=r"No space left on device; free space"):
        publish(slope=2.0)
    assert read_record(folder) == before


def test_unwritable_figures_folder_is_one_sentence(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "build").write_text("a file where a folder should be")
    with pytest.raises(DsvError, match=r"cannot write to .*by-hand"):
        start()
    monkeypatch.setenv("DSV_FIGURES", str(checkout / "elsewhere"))
    assert start().directory == checkout / "elsewhere" / "quick" / "01_line"


def test_bad_values_are_refused() -> None:
    run = start()
    with pytest.raises(ValueError, match="finite"):
        run.record("K1", "loss", float("nan"))
    with pytest.raises(ValueError, match="alt"):
        run.save_figure(line(), "line", alt="")
    with pytest.raises(ValueError, match="letters"):
        run.save_table(pd.DataFrame({"x": [1]}), "../escape")
    with pytest.raises(ValueError, match="taken"):
        run.save_table(pd.DataFrame({"x": [1]}), "record")
    with pytest.raises(ValueError, match="parameters"):
        start(parameters={"model": object()})
    run.complete()
    with pytest.raises(DsvError, match="complete"):
        run.complete()


def test_badge_follows_the_preset_unless_told_otherwise() -> None:
    assert start(preset="smoke").badge == "smoke run · not a result · run by hand"
    with whole_run(repository_root() / "build/runs/cifar10/01_line"):
        assert start(preset="cifar10").badge == "CIFAR-10 · reduced"
        assert start(preset="cifar10", scale="CIFAR-10").badge == "CIFAR-10"


def test_code_digest_follows_code_cells_and_lock(checkout: Path) -> None:
    before = code_digest("01_line")
    path = checkout / "notebooks" / "01_line.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
    path.write_text(json.dumps(notebook))
    assert code_digest("01_line") == before
    notebook["cells"][0]["source"] = "x = 2"
    path.write_text(json.dumps(notebook))
    changed = code_digest("01_line")
    assert changed != before
    (checkout / "requirements.lock").write_text("torch==2.6")
    assert code_digest("01_line") != changed


def test_a_run_is_current_until_a_classifier_that_it_read_changes(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsvlib._files.checkpoints_folder", lambda: checkout)
    monkeypatch.setattr(run_module, "_opened", set())
    mine, other = (checkout / f"{name}.safetensors" for name in ("mine", "other"))
    dsvlib.save_classifier(
        mine, dsvlib.build_model("convnet", num_classes=2, shape=(1, 8, 8), width=2)
    )
    elsewhere = Path(shutil.copy(mine, checkout / "notebooks" / "own.safetensors"))
    dsvlib.load_classifier("mine")
    dsvlib.load_classifier(elsewhere)
    record = read_record(publish().directory)
    assert list(record["checkpoints"]) == ["mine"]
    assert is_current(record)
    other.write_text("a new one that this run did not read")
    assert is_current(record)
    mine.write_text("trained anew")
    assert not is_current(record)
    mine.unlink()
    assert not is_current(record)
    assert not is_current(record | {"checkpoints": {}, "code": "of other code"})


def test_what_makes_a_number_is_in_the_digest() -> None:
    names = {path.name for path in run_module.result_sources()}
    assert {"synthesis.py", "training.py", *run_module.BESIDE_THE_METHOD} <= names
    assert not {"workflow.py", "claims.py", "cli.py"} & names
