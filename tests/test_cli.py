"""The command line: one line on stderr, an honest exit status, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from command_line import run, stderr_line
from PIL import Image

import dsvlib
from dsvlib import cli
from dsvlib._files import PACKAGE


def test_bare_command_and_version_without_heavy_imports() -> None:
    code = (
        "import sys, dsvlib.cli\n"
        "for words in ([], ['--version'], ['--help']):\n"
        "    try: dsvlib.cli.main(words)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print({'torch', 'pandas', 'matplotlib', 'papermill'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "set()"
    assert f"\ndsvlib {dsvlib.__version__}\n" in result.stdout
    shown, _, again = result.stdout.partition(f"dsvlib {dsvlib.__version__}\n")
    assert shown.strip() == again.removesuffix("set()\n").strip(), "a bare dsv shows its help"
    for command in ("synthesize", "data", "reproduce"):
        assert command in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "nonsense"),
        (["synthesize", "--out", "x"], "--classifier or --architecture"),
        (["synthesize", "--out", "x", "--architecture", "mynet:build"], "--weights FILE with it"),
        (
            ["synthesize", "--out", "x", "--classifier", "digits-convnet", "--mean", "grey"],
            "--mean: expected numbers",
        ),
    ],
)
def test_wrong_request_is_status_two_and_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert message in stderr_line(capsys)


def test_commands_of_the_companion_say_what_they_lack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "checkout", lambda: None)
    for words in (["reproduce", "--preset", "smoke"], ["train", "--help"], ["notebooks", "check"]):
        assert run(*words) == 2
        line = stderr_line(capsys)
        assert line.startswith(f"dsv: {words[0]}: a command of the companion needs a checkout; ")
        assert "clone the repository" in line
    monkeypatch.undo()
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    assert run("reproduce") == 2
    assert 'pip install -e ".[companion]"' in stderr_line(capsys)


def test_a_package_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def register(app: Any) -> None:
        @app.command()
        def draw() -> None:
            raise ModuleNotFoundError("No module named 'seaborn'")

    with pytest.raises(SystemExit, match="1"):
        cli.main(["draw"], register)
    assert "'seaborn'; pip install \"dsvlib[companion]\"" in stderr_line(capsys)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    model = dsvlib.build_model("convnet", num_classes=3, shape=(1, 8, 8), width=4, depth=1)
    path = tmp_path / "small.safetensors"
    dsvlib.save_classifier(path, model, classes=["a", "b", "c"], mean=[0.5], std=[0.25])
    return path


def test_synthesize_writes_a_whole_folder(classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    words = ["synthesize", "--classifier", str(classifier), "--out", str(out), "--steps", "3"]
    assert run(*words, "--labels", "0,2,2") == 0
    names = {path.name for path in out.iterdir()}
    assert {"samples.safetensors", "samples.png", "history.csv", "residuals.csv"} <= names
    samples = dsvlib.SupportSet.load(out / "samples.safetensors")
    assert samples.labels.tolist() == [0, 2, 2]
    assert samples.classes == ("a", "b", "c")
    assert samples.inputs.min() >= -2.0001
    assert samples.inputs.max() <= 2.0001
    table = pd.read_csv(out / "residuals.csv")
    assert {"stationarity", "cosine", "primal", "dual", "active"} == set(table["quantity"])
    assert {path.name for path in tmp_path.iterdir()} == {"small.safetensors", "made"}


def test_synthesize_takes_class_names_and_ones_own_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ownnet.py").write_text(
        "from torch import nn\n"
        "def build(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Tanh(), nn.Flatten(),\n"
        "                         nn.Linear(36 * width, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec((tmp_path / "ownnet.py").read_text(), names)
    torch.save(names["build"]().state_dict(), tmp_path / "own.pt")
    (tmp_path / "classes.txt").write_text("cat\nhot dog\n")
    words = ["synthesize", "--architecture", "ownnet:build", "--weights", "own.pt"]
    words += ["--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--shape", "3,8,8"]
    words += ["--classes", "classes.txt", "--steps", "3", "--checkpoint", "state"]
    assert run(*words, "--labels", "hot dog,0", "--out", "made") == 0
    samples = dsvlib.SupportSet.load(tmp_path / "made" / "samples.safetensors")
    assert samples.labels.tolist() == [1, 0]
    assert samples.images().shape == (2, 3, 8, 8)
    assert not (tmp_path / "state").exists()
    capsys.readouterr()
    assert run(*words, "--labels", "hot dgo", "--out", "more") == 2
    assert "did you mean 'hot dog'" in stderr_line(capsys)
    torch.save(names["build"](5).state_dict(), tmp_path / "own.pt")
    assert run(*words, "--out", "more") == 1
    assert "got [5, 3, 3, 3] for '0.weight', expected [4, 3, 3, 3]" in stderr_line(capsys)
    assert not (tmp_path / "more").exists()


def test_synthesize_refuses_and_writes_nothing(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    base = ["synthesize", "--classifier", str(classifier)]
    cases = [
        ([*base, "--out", str(full)], 2, "new or empty"),
        ([*base, "--out", str(tmp_path / "x"), "--labels", "0,9"], 2, "from 0 to 2"),
        ([*base, "--out", str(tmp_path / "x"), "--labels", "bb"], 2, "did you mean 'b'"),
        ([*base, "--out", str(tmp_path / "x"), "--labels", "0", "--per-class", "1"], 2, "got both"),
        ([*base, "--out", str(tmp_path / "x"), "--steps", "0"], 2, "--steps"),
        (["synthesize", "--classifier", "no.safetensors", "--out", str(tmp_path / "x")], 1, "no.s"),
    ]
    for words, status, message in cases:
        assert run(*words) == status, words
        assert message in stderr_line(capsys)
    assert not (tmp_path / "x").exists()
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_synthesis_that_fails_leaves_nothing(
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(cli, "_draw", full)
    out = tmp_path / "made"
    words = ["synthesize", "--classifier", str(classifier), "--out", str(out), "--steps", "2"]
    assert run(*words) == 1
    assert "No space left" in stderr_line(capsys)
    status = dsvlib.Status.NON_FINITE
    monkeypatch.setattr(dsvlib, "synthesize", lambda *_, **__: SimpleNamespace(status=status))
    assert run(*words) == 1
    assert "Nothing was written" in stderr_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_what_is_finished_is_not_lost(
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Writing fails after the last step: the state is still there, and a second call goes on."""
    words = ["synthesize", "--classifier", str(classifier), "--steps", "60", "--labels", "0"]
    words += ["--out", str(tmp_path / "made"), "--checkpoint", str(tmp_path / "state")]
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_draw", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert run(*words) == 1
    assert "disk full" in stderr_line(capsys)
    assert (tmp_path / "state").is_file()
    assert run(*words) == 0
    resumed = dsvlib.SupportSet.load(tmp_path / "made" / "samples.safetensors")
    assert not (tmp_path / "state").exists()
    words[words.index(str(tmp_path / "made"))] = str(tmp_path / "again")
    assert run(*words) == 0
    again = dsvlib.SupportSet.load(tmp_path / "again" / "samples.safetensors")
    assert torch.equal(resumed.inputs, again.inputs)


def test_what_cannot_be_written_is_not_begun(
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dsvlib, "open_classifier", lambda *_, **__: pytest.fail("begun"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "made", tmp_path / ("x" * 300)):
        assert run("synthesize", "--classifier", str(classifier), "--out", str(out)) == 1
        assert "cannot write" in stderr_line(capsys)
    words = ["--out", str(tmp_path / "made"), "--checkpoint", str(tmp_path / "file" / "state")]
    assert run("synthesize", "--classifier", str(classifier), *words) == 1
    assert "cannot write" in stderr_line(capsys)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--seed", "-1"], 2, "--seed: expected a whole number from 0 to"),
        (["--seed", "36893488147419103232"], 2, "--seed: expected a whole number from 0 to"),
        (["--seed", "two"], 2, "--seed"),
        (["--per-class", "0"], 2, "--per-class: expected a whole number ≥ 1"),
        (["--per-class", "-3"], 2, "--per-class"),
        (["--per-class", "1.5"], 2, "--per-class"),
        (["--per-class", "99999999999999999999"], 2, "--per-class: expected images of at most"),
        (["--mean", "123.7"], 1, "divide by 255"),
        (["--shape", "1,0,8"], 1, "shape: expected (channels, height, width)"),
        (["--shape", "1,20,20"], 1, "can read, got [2, 1, 20, 20]"),
        (["--classes", "missing.txt"], 2, "--classes: expected a text file"),
        (["--classes", "latin.txt"], 2, "got another encoding"),
        (["--classes", "two.txt"], 1, "classes 2, logits 3"),
        (["--labels", ""], 2, "--labels: expected names or numbers"),
        (["--checkpoint", "."], 1, "checkpoint: expected a file, got the folder"),
    ],
)
def test_values_out_of_range_are_one_line(
    words: list[str], status: int, message: str, classifier: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("pêche\nb\nc".encode("latin-1"))
    Path("two.txt").write_text("b\nc")
    base = ["synthesize", "--classifier", str(classifier), "--out", "made", "--steps", "2"]
    assert run(*base, *words) == status
    assert message in stderr_line(capsys)
    assert not Path("made").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_lists_with_marks_and_other_line_ends(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "classes").write_bytes("pêche\r\n 猫 \r\n\r\nc".encode(encoding))
    assert cli._class_list(tmp_path / "classes") == ["pêche", "猫", "c"]


def test_a_warning_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = "nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Softmax(1))"
    (tmp_path / "softly.py").write_text(f"from torch import nn\ndef build():\n    return {net}\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    torch.save({"1.weight": torch.eye(2, 64), "1.bias": torch.zeros(2)}, tmp_path / "own.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["synthesize", "--architecture", "softly:build", "--weights", "own.pt", "--steps", "2"]
    words += ["--mean", "0.5", "--std", "0.5", "--shape", "1,8,8", "--classes", "classes.txt"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run(*words, "--out", "made") == 0
    assert stderr_line(capsys).startswith("dsv: warning: model: expected logits, got probabilities")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def build(:", "got SyntaxError"),
        ("def build():\n    raise KeyError('width')", "got KeyError: 'width'"),
        ("def build():\n    raise SystemExit(0)", "got SystemExit: 0"),
        ("def build():\n    return undefined", "got NameError"),
        ("def build():\n    return (1, 2)", "got tuple"),
    ],
)
def test_whatever_a_users_code_does_is_one_line(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = f"module{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    (tmp_path / "own.pt").write_text("<html>404</html>")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["synthesize", "--architecture", f"{name}:build", "--weights", "own.pt"]
    words += ["--mean", "0.5", "--std", "0.5", "--shape", "1,8,8", "--out", "made"]
    assert run(*words) == 1
    assert message in stderr_line(capsys)


def test_the_picture_shows_every_image_with_its_name(tmp_path: Path) -> None:
    images = torch.linspace(0, 1, 12)[:, None, None, None].expand(12, 1, 16, 16)
    names = ["plain", "$x_$", "猫", "a name that is far too long for one picture", *"cdefghij"]
    cli._draw(tmp_path / "page.png", images, names)
    page = Image.open(tmp_path / "page.png")
    assert page.size == (10 * 196, 2 * 216)
    for index in range(12):
        x, y = index % 10 * 196, index // 10 * 216
        grey = round(index / 11 * 255)
        assert abs(page.getpixel((x + 98, y + 98))[0] - grey) <= 1
        below = page.crop((x, y + 195, x + 196, y + 215)).convert("L")
        assert below.getextrema()[0] < 128, "a name stands below"
        assert below.crop((193, 0, 196, 20)).getextrema()[0] == 255, "and within its column"


def test_data_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "list") == 0
    assert "digits" in capsys.readouterr().out


class Any224(torch.nn.Module):
    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.fixed, self.last = fixed, torch.nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.fixed and inputs.shape[2:] != (224, 224):
            raise ValueError("reads one size")
        return self.last(inputs.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("side", "fixed", "expected"),
    [(224, False, "large_photographs"), (224, True, "photographs"), (32, False, "photographs")],
)
def test_large_images_get_windows_where_the_network_reads_them(side, fixed, expected):
    opened = dsvlib.Classifier(
        Any224(fixed), classes=("a", "b"), mean=(0.5,) * 3, std=(0.5,) * 3, shape=(3, side, side)
    )
    assert cli.preset_for(opened)() == getattr(dsvlib.SynthesisConfig, expected)()
