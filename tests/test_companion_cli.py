"""The companion's commands: one line on stderr, an honest exit status."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import command_line
import pytest
import torch
from command_line import stderr_line

import dsvlib.cli
from companion import cli, notebooks, recipes, workflow
from dsvlib._files import PACKAGE

run = functools.partial(command_line.run, main=cli.main)


def test_help_names_every_command_without_heavy_imports() -> None:
    code = (
        "import sys; sys.modules['fcntl'] = None\n"  # as on Windows, where all but runs should work
        "import companion.cli, companion.notebooks\n"
        "try: companion.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print({'torch', 'pandas', 'matplotlib', 'papermill'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "set()"
    commands = (
        "reproduce",
        "claims",
        "notebooks",
        "train",
        "synthesize",
        "doctor",
        "data",
        "site",
        "report",
    )
    for command in commands:
        assert command in result.stdout


def test_their_names_are_known_where_they_are_missing() -> None:
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    names += [group.name for group in cli.app.registered_groups]
    assert sorted(names) == sorted(dsvlib.cli.COMPANION + dsvlib.cli.ANYWHERE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reproduce", "--prest", "quick"], "--prest"),
        (["reproduce", "--preset", "quik"], "did you mean 'quick'"),
        (["reproduce", "--jobs", "two"], "--jobs"),
        (["reproduce", "--only", "77"], "unknown notebook '77'"),
        (["notebooks", "run", "77"], "unknown notebook '77'"),
        (["notebooks", "run", "04", "--threads", "0"], "--threads"),
        (["reproduce", "--jobs", "99999999999999999999"], "from 1 to 1024"),
        (["notebooks", "run", "04", "--threads", "99999999999999999999"], "from 1 to 1024"),
        (["reproduce", "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N"),
        (["reproduce", "--device", "cuda:"], "--device: expected auto, cpu, cuda or cuda:N"),
        (["reproduce", "--device", "cuda:999"], "--device: expected auto or cpu, since torch sees"),
        (["notebooks", "run", "04", "--device", "cuda:999"], "since torch sees"),
        (["cell", "DSV", "1", "0", "--device", "cuda:999"], "since torch sees"),
        (["record", "--device", "cuda:999"], "since torch sees"),
        (["reproduce", "--data-root", ""], "--data-root: expected a folder, got ''"),
        (["reproduce", "--data-root", "pyproject.toml"], "--data-root: expected a folder"),
        (["notebooks", "run", "04", "--data-root", "no/such"], "--data-root: expected a folder"),
        (["cell", "DSV", "1", "0", "--data-root", "no/such"], "--data-root: expected a folder"),
        (["cell", "DSV", "1", "0", "--seeds", "-1"], "--seeds: expected whole numbers from 0"),
        (["cell", "DSV", "1", "0", "--seeds", "99999999999"], "--seeds: expected whole numbers"),
        (["cell", "DSV", "1", "0", "--seeds", "0;1"], "--seeds: expected numbers with commas"),
        (["claims", "--scale", "quik"], "did you mean 'quick'"),
        (["doctor", "--preset", "quik"], "did you mean 'quick'"),
        (["doctor", "--data-root", "no/such/folder"], "--data-root: expected a folder"),
        (["site", "--preset", "quik"], "did you mean 'quick'"),
        (["train"], "NAME of a shipped classifier or --all"),
        (["train", "digits-judge", "--all"], "one of the two"),
        (["train", "digts-convnet"], "unknown classifier 'digts-convnet'; did you mean 'digits-"),
        (["train", "--all", "--root", "no/such/folder"], "--root: expected a folder"),
    ],
)
def test_wrong_request_is_status_two_and_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert message in stderr_line(capsys)


@pytest.mark.parametrize("command", [["reproduce"], ["notebooks", "run", "05"]])
def test_photographs_that_are_not_there_are_said_before_anything_starts(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("schedule", "run_job"):
        monkeypatch.setattr(workflow, name, lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr("companion.data_needs.reachable", lambda _: False)  # no network
    assert run(*command, "--preset", "cifar10", "--data-root", str(tmp_path)) == 2
    line = stderr_line(capsys)
    assert f"copy train/<class>/* and test/<class>/* to {tmp_path}/cifar10" in line


def test_one_missing_folder_of_several_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "schedule", lambda *_, **__: pytest.fail("started"))
    (tmp_path / "cifar10" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "cifar10" / "train" / "cat" / "0.png").touch()
    assert run("reproduce", "--preset", "cifar10", "--data-root", str(tmp_path)) == 2
    line = stderr_line(capsys)
    assert f"to {tmp_path}/cifar100" in line
    assert "the images of cifar10;" not in line


def test_failed_notebook_is_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {}

    def failing(preset: str, **options: object) -> bool:
        given.update(options, preset=preset)
        return False

    monkeypatch.setattr(workflow, "reproduce", failing)
    assert run("reproduce", "--only", "03", "--only", "05", "--jobs", "2", "--force") == 1
    assert "failed" in stderr_line(capsys)
    assert given["only"] == ["03", "05"]
    assert (given["preset"], given["jobs"], given["force"]) == ("quick", 2, True)


def test_interrupt_is_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "reproduce", interrupted)
    assert run("reproduce") == 130
    assert "interrupted" in stderr_line(capsys)


def test_debug_gives_the_traceback_anywhere_in_the_line() -> None:
    with pytest.raises(RuntimeError, match="unknown preset"):
        cli.main(["reproduce", "--preset", "quik", "--debug"])


def test_notebook_problems_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notebooks, "check_notebooks", lambda: ["01_x: a problem"])
    assert run("notebooks", "check") == 1
    assert capsys.readouterr().out == "01_x: a problem\n"
    monkeypatch.setattr(notebooks, "check_notebooks", list)
    assert run("notebooks", "check") == 0


def test_train_prints_one_line_per_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def trained(name: str, *, root: str | None, device: str) -> dict[str, float]:
        assert device == "cpu"
        asked.append((name, root))
        numbers = {"train_accuracy": 1.0, "test_accuracy": 0.98765}
        return numbers | {"stationarity": 0.01234, "cosine": 0.99987}

    monkeypatch.setattr(recipes, "train_shipped", trained)
    monkeypatch.setattr(recipes, "is_shipped", lambda _: False)
    assert run("train", "digits-judge", "--root", str(tmp_path)) == 0
    line = capsys.readouterr().out
    expected = r"train 1.0000 · test 0.9877 · stationarity 0.0123 · cosine 0.9999 · "
    expected += r"data/checkpoints/digits-judge.safetensors · 0.0 s\n"
    assert re.fullmatch(rf"digits-judge +{expected}", line)
    assert run("train", "--all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes.RECIPES)
    bundled = [name for name, recipe in recipes.RECIPES.items() if recipe.dataset == "digits"]
    assert asked == [("digits-judge", str(tmp_path)), *((name, None) for name in bundled)]
    others = [line for line in lines if line.split()[0] not in bundled]
    assert others
    assert all("left as it is" in line and "--root" in line for line in others)
    asked.clear()
    assert run("train", "--all", "--root", str(tmp_path)) == 0
    assert asked == [(name, str(tmp_path)) for name in recipes.RECIPES]
    asked.clear()  # cut off and called again: what is there is not made twice
    monkeypatch.setattr(recipes, "is_shipped", lambda name: name != "digits-vit")
    assert run("train", "--all", "--root", str(tmp_path)) == 0
    assert asked == [("digits-vit", str(tmp_path))]
    assert "is here by its present recipe" in capsys.readouterr().out
    assert run("train", "digits-vit", "--device", "tpu") == 2
    assert "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'" in capsys.readouterr().err
    assert run("train", "digits-vit", "--device", "auto") == 2
    assert "--device: expected cpu or cuda to train on" in capsys.readouterr().err


def test_doctor_says_what_is_missing_and_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "--preset", "cifar10", "--data-root", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for word in ("python", "device", "threads", "memory", "disk"):
        assert re.search(rf"^{word} +\S", printed, re.MULTILINE), word
    assert f"data cifar10 missing: dsv data fetch cifar10 --root {tmp_path}" in printed
    assert re.search(r"^04_coresets +(up to date|.* (h|min|s)\b)", printed, re.MULTILINE)
    assert re.search(r"^together, .* for \d+ runs", printed, re.MULTILINE)
    (tmp_path / "cifar10" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "cifar10" / "train" / "cat" / "0.png").touch()
    assert run("doctor", "--preset", "cifar10", "--data-root", str(tmp_path)) == 0
    assert "data cifar10 present" in capsys.readouterr().out
    assert run("doctor", "--preset", "imagenette", "--data-root", str(tmp_path)) == 0
    folder = f"copy train/<class>/* and test/<class>/* to {tmp_path}/imagenette-64"
    assert f"data imagenette-64 missing: {folder}" in capsys.readouterr().out
