"""The house: what may import what, what a newcomer sees, and the checks of style and types."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsvlib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dsvlib"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in (PACKAGE, ROOT / "companion")
    for path in package.rglob("*.py")
)


def contracts(root: Path) -> subprocess.CompletedProcess[str]:
    """Hold the packages below `root` against the contracts of its pyproject.toml."""
    code = (
        "from importlinter.cli import lint_imports as check; raise SystemExit(check(no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )


def test_imports_go_one_way():
    result = contracts(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 2 kept, 0 broken" in result.stdout


ARROWS = {
    "logits.py": ("import companion.runs", "dsvlib.logits -> companion.runs"),
    "conditions.py": ("def draw():\n    import seaborn", "dsvlib.conditions -> seaborn"),
    "selection.py": ("import dsvlib.multipliers", "dsvlib.selection -> dsvlib.multipliers"),
    "support_set.py": ("import dsvlib.evaluation", "dsvlib.support_set -> dsvlib.evaluation"),
    "drawer.py": ("", "dsvlib.drawer"),  # a file that has no place yet
}


def test_arrows_against_the_stream_are_noticed(tmp_path):
    for name in ("dsvlib", "companion"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, (line, _) in ARROWS.items():
        with (tmp_path / "dsvlib" / file).open("a") as source:
            source.write(f"\n{line}\n")
    result = contracts(tmp_path)
    assert result.returncode != 0
    for file, (_, broken) in ARROWS.items():
        assert broken in result.stdout, f"{file}\n{result.stdout}"


def test_there_is_no_drawer_for_everything():
    assert not {"utils", "util", "helpers", "misc", "common"} & {
        name.rpartition(".")[2] for name in MODULES
    }


@pytest.mark.parametrize("name", dsvlib.__all__)
def test_public_names_exist_and_explain_themselves(name):
    value = getattr(dsvlib, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
        assert value.__module__.startswith("dsvlib.")
        for attribute, member in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(member) and not attribute.startswith("_"):
                assert inspect.getdoc(member), f"{name}.{attribute}"


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for attribute, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            assert attribute.startswith("_") or inspect.getdoc(value), f"{name}.{attribute}"


def test_the_promised_names_are_public():
    promised = {
        *("SupportSet", "Dataset", "Solution", "Residuals", "Evaluation"),
        *("load_dataset", "build_model", "load_classifier", "save_classifier"),
        *("train", "TrainConfig", "accuracy", "evaluate", "EvaluationConfig"),
        *("weighted_gradient", "residuals", "deepkkt_loss", "total_variation"),
        *("synthesize", "SynthesisConfig", "entropy", "margin"),
    }
    assert promised <= set(dsvlib.__all__)
    assert set(dsvlib.__all__) <= set(dir(dsvlib))


def test_there_are_few_public_names():
    assert len(dsvlib.__all__) <= 56


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No dsvlib attribute synthesise"):
        _ = dsvlib.synthesise


def test_import_is_light_and_names_are_loaded_on_first_use():
    code = """
import sys
import dsvlib, companion.cli
heavy = ["torch", "numpy", "pandas", "sklearn", "matplotlib", "torchvision", "scipy"]
print([m for m in heavy if m in sys.modules])
dsvlib.SupportSet
print("torch" in sys.modules, "dsvlib.synthesis" in sys.modules)
for name in dsvlib.__all__:
    getattr(dsvlib, name)
print([m for m in ("matplotlib", "seaborn", "sklearn", "torchvision") if m in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["[]", "True", "False", "[]"]


# --- style and types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "--no-cache"), ("ruff", "format", "--check", "--no-cache"), ("mypy",)],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_style_and_types(command):
    pytest.importorskip(command[0])
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_mistyped_name_is_refused_by_the_type_checker(tmp_path):
    """`__init__` loads names on first use; the stub beside it tells tools their types."""
    pytest.importorskip("mypy")
    script = tmp_path / "typo.py"
    script.write_text("import dsvlib\n\ndsvlib.synthesise_typo(1)\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", ".mypy_cache", str(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert 'Module has no attribute "synthesise_typo"' in result.stdout
