"""The first commands on a strange machine: environment, lock, CI, and one version everywhere.

Nothing is installed here: `make` runs in a copy with a stand-in for Python that only writes down
what it is asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import dsvlib

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(sys.executable)

# Stands for python3 and for the environment's python: makes an environment of stand-ins.
STAND_IN = f"""#!/bin/sh
case "$1 $2" in
  "-m venv") echo venv >> calls.log; mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;
  "-m pip")  echo pip >> calls.log; cp "$0" .venv/bin/uv;;
  "pip install") echo install >> calls.log; test ! -e no-network;;
  "-c import sys, pip"*|"-c import torch"*) ;;
  *) exec {REAL} "$@";;
esac
"""


class Folder:
    """A checkout with the real Makefile, and `make` with a stand-in for Python."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.venv = path / ".venv"
        path.mkdir()
        shutil.copy(ROOT / "Makefile", path)
        for name in ("requirements.lock", "pyproject.toml"):
            (path / name).touch()
        (path / "stand-in").write_text(STAND_IN)
        (path / "stand-in").chmod(0o755)

    def make(self, target: str = "install") -> subprocess.CompletedProcess[str]:
        (self.path / "calls.log").unlink(missing_ok=True)
        return subprocess.run(
            ["make", target, f"PYTHON={self.path}/stand-in"],
            cwd=self.path,
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON"))},
        )

    @property
    def calls(self) -> list[str]:
        log = self.path / "calls.log"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "checkout")


def killed_at_once(venv: Path) -> None:
    venv.mkdir()


def killed_before_pip(venv: Path) -> None:
    subprocess.run([REAL, "-m", "venv", "--without-pip", venv], check=True)


def killed_within_pip(venv: Path) -> None:
    killed_before_pip(venv)
    (package,) = venv.glob("lib/python*/site-packages")
    (package / "pip").mkdir()
    (package / "pip" / "__init__.py").touch()


def python_gone(venv: Path) -> None:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/nowhere/python3")


def a_file(venv: Path) -> None:
    venv.touch()


@pytest.mark.parametrize(
    "leave",
    [killed_at_once, killed_before_pip, killed_within_pip, python_gone, a_file],
)
def test_a_half_made_environment_is_made_anew(folder: Folder, leave: Callable[[Path], None]):
    leave(folder.venv)
    done = folder.make()
    assert done.returncode == 0, done.stderr
    assert "making it anew" in done.stdout
    assert folder.calls == ["venv", "pip", "install", "install"]
    assert folder.make().returncode == 0
    assert folder.calls == []


def test_an_installation_that_failed_is_begun_again(folder: Folder):
    (folder.path / "no-network").touch()
    assert folder.make().returncode != 0
    assert not (folder.venv / ".ready").exists()
    (folder.path / "no-network").unlink()
    assert folder.make().returncode == 0
    assert folder.calls.count("venv") == 1


def test_a_new_lock_is_installed_into_the_environment_there_is(folder: Folder):
    assert folder.make().returncode == 0
    assert folder.calls == ["venv", "pip", "install", "install"]
    ready = folder.venv / ".ready"
    os.utime(ready, (1, 1))
    assert folder.make().returncode == 0
    assert folder.calls == ["pip", "install", "install"]


def test_a_moved_checkout_is_installed_again(folder: Folder, tmp_path: Path):
    assert folder.make().returncode == 0
    folder.path = folder.path.rename(tmp_path / "moved")
    assert folder.make().returncode == 0
    assert folder.calls == ["pip", "install", "install"]


def test_the_lowest_versions_have_an_environment_of_their_own(folder: Folder):
    """Resolved from pyproject.toml: the hashes of the lock are those of other builds."""
    printed = subprocess.run(
        ["make", "-n", "test-lowest"], cwd=folder.path, capture_output=True, text=True, check=True
    ).stdout
    assert "--resolution lowest-direct" in printed
    assert "requirements.lock" not in printed
    assert re.search(r"\.venv/", printed) is None


def test_clean_removes_an_unfinished_environment_only(folder: Folder):
    killed_at_once(folder.venv)
    assert folder.make("clean").returncode == 0
    assert not folder.venv.exists()
    folder.make()
    folder.make("clean")
    assert (folder.venv / ".ready").exists()


def test_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    for target in phony[1].split():
        assert re.search(rf"^{target}:.* ## ", text, re.MULTILINE), target


# --- the lock, CI and Binder ---------------------------------------------------------------------


def locked() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text()
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", text, re.MULTILINE))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_everything_that_is_asked_for_is_locked():
    extras = dict(project()["optional-dependencies"])
    del extras["imagenet"]  # weights alone, without which everything else works and is tested
    wanted = [*project()["dependencies"], *(name for extra in extras.values() for name in extra)]
    names = {re.split(r"[\[>=<]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names - {"dsvlib"} <= set(locked())


def test_the_method_asks_for_no_notebook_server():
    text = " ".join(project()["dependencies"])
    for name in ("jupyter", "ipykernel", "papermill", "snakemake", "seaborn", "matplotlib"):
        assert name not in text


def test_binder_takes_all_but_torch_from_the_lock():
    script = (ROOT / ".binder" / "postBuild").read_text()
    pattern = re.search(r"cuda='(.*)'", script)
    assert pattern
    left = {name for name in locked() if re.match(pattern[1], f"{name}==")}
    assert {"torch", "torchvision"} <= left
    assert all(name.startswith(("torch", "triton", "nvidia-", "cuda-")) for name in left)


def test_ci_runs_what_the_readme_says_in_its_order():
    script = (ROOT / ".ci" / "run").read_text()
    commands = [
        "make figures PRESET=smoke",
        'clean "make figures"',
        "make test\n",
        'clean "make test"',
        "make site\n",
        "make test-site\n",
    ]
    places = [script.index(f"\n{command}") for command in commands]
    assert places == sorted(places)
    readme = (ROOT / "README.md").read_text()
    assert readme.index("make figures") < readme.index("make test")


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")))
def test_workflows_are_pinned_and_may_only_read(path: Path):
    text = path.read_text()
    content = yaml.safe_load(text)
    assert content["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in content["jobs"].values())
    uses = re.findall(r"uses: *(\S+)", text)
    assert uses
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in uses)


def test_the_version_is_one():
    version = project()["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## \[([^]]+)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert dsvlib.__version__ == version == citation["version"] == headings[0][0]
    assert headings[0][1] in {" – unreleased", f" – {citation['date-released']}"}
