"""The wheel, used from an empty folder: the method works, and nothing is written beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dsvlib
from dsvlib._files import checkout

pytest.importorskip("hatchling")
ROOT = Path(__file__).resolve().parent.parent
METHOD = """
import dsvlib, dsvlib._files, dsvlib.cli
model, about = dsvlib.load_classifier("digits-convnet")
print(dsvlib.__file__, about["dataset"], dsvlib._files.checkpoints_folder(), sep="\\n")
words = "--classifier digits-convnet --labels 3 --steps 2 --out made".split()
for words in (["data", "list"], ["synthesize", *words]):
    try: dsvlib.cli.main(words)
    except SystemExit as end: assert end.code == 0
"""
COMMANDS = """
import sys, dsvlib.cli
for words in ([], ["--version"], ["reproduce", "--preset", "smoke"]):
    try: dsvlib.cli.main(words)
    except SystemExit as end: print("status", end.code)
"""


REPORT = """
import sys, companion.cli, dsvlib.cli
words = "report --classifier digits-convnet --data digits --limit 40 --classes 3 --out r.html"
try: dsvlib.cli.main(words.split())
except SystemExit as end: print("status", end.code)
print(companion.cli.__file__)
sys.modules["jinja2"] = None
for name in [name for name in sys.modules if name.startswith("companion.")]: del sys.modules[name]
try: dsvlib.cli.main(words.split())
except SystemExit as end: print("status", end.code)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as site-packages, with the wheel in it and nothing else."""
    made, site = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(made)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, home: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder whose user has an empty home."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DSV_", "XDG_"))}
    environment |= {"PYTHONPATH": str(site), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True
    )


def test_the_method_works_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    before = sorted(site.rglob("*"))
    assert checkout() == ROOT
    found = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert found == {"dsvlib", "companion"}
    assert not list(site.rglob("*.pyc"))
    used = run(site, tmp_path, METHOD)
    assert used.returncode == 0, used.stderr
    where, dataset, cache = used.stdout.splitlines()[:3]
    assert Path(where).parent == site / "dsvlib"
    assert dataset == "digits"
    assert Path(cache).is_relative_to(tmp_path), "what is trained goes to the user's cache"
    assert f"missing: a folder of images in {tmp_path}" in used.stdout, "and so do downloads"
    assert (tmp_path / "made" / "samples.png").is_file()
    assert sorted(site.rglob("*")) == before, "nothing is written beside the package"


def test_the_command_line_outside_a_checkout(site: Path, tmp_path: Path) -> None:
    used = run(site, tmp_path, COMMANDS)
    assert used.stdout.startswith("Usage: dsv")
    assert "synthesize" in used.stdout
    assert used.stdout.endswith(f"status 0\ndsvlib {dsvlib.__version__}\nstatus 0\nstatus 2\n")
    assert used.stderr.startswith("dsv: reproduce: a command of the companion needs a checkout")
    assert used.stderr.count("\n") == 1


def test_the_report_needs_no_checkout_but_the_extra(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    used = run(site, tmp_path, REPORT)
    assert used.returncode == 0, used.stderr
    said = used.stdout.splitlines()
    assert said[-3:] == ["status 0", str(site / "companion" / "cli.py"), "status 1"]
    assert (tmp_path / "r.html").stat().st_size > 50_000
    assert [path.name for path in tmp_path.iterdir() if "r.html" in path.name] == ["r.html"]
    assert "jinja2" in used.stderr
    assert 'pip install "dsvlib[companion]" brings what the command needs' in used.stderr


def test_an_editable_installation_holds_no_copy_of_the_code(tmp_path: Path) -> None:
    """A copy in site-packages would be imported in the place of the checkout's own."""
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["editable"])
    with zipfile.ZipFile(wheel) as archive:
        copies = [name for name in archive.namelist() if name.endswith((".py", ".pyi", ".html"))]
    assert copies == []
