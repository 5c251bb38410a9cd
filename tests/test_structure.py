"""The house: what may import what, what a newcomer sees, and the checks of style and types."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dsvlib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dsvlib"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# Data flow downwards: a module imports from floors above its own, and never from its neighbours.
FLOORS = (
    ("files", "validation", "progress", "comparison", "allocation"),
    ("samples", "distance", "second_order", "nonnegative"),
    ("datasets", "models", "derivatives", "run_state"),
    ("conditions", "priors", "augmentation", "checkpoints"),
    ("solution", "training", "sample_gradients", "sources"),
    ("analysis", "plane", "spectrum"),
    ("synthesis", "multipliers", "selection", "distillation"),
    ("evaluation", "judging", "ranking", "trail"),
    ("zoo", "figures"),
    ("run",),
    ("presets",),
    ("results", "cells", "downloads"),
    ("claims", "wall"),
    ("graph",),
    ("reproduce",),
    ("editions", "forecast"),
    ("notebook_files", "pages"),
    ("site",),
    ("cli",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports(name: str) -> set[str]:
    """Return the full names of all modules that `dsvlib/<name>.py` imports, also inside functions.

    Imports under TYPE_CHECKING count too: they tie a file to another as much.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py: write dsvlib.… instead of a relative import"
            assert node.module is not None
            if node.module == "dsvlib":
                found |= {f"dsvlib.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def own_imports(name: str) -> set[str]:
    parts = {module.split(".")[1] for module in imports(name) if module.startswith("dsvlib.")}
    return parts & set(MODULES)


@pytest.mark.parametrize("name", [m for m in MODULES if m != "__init__"])
def test_imports_go_one_way(name):
    assert name in FLOOR_OF, f"give {name}.py its floor in FLOORS"
    wrong = {other for other in own_imports(name) if FLOOR_OF[other] >= FLOOR_OF[name]}
    assert not wrong, f"{name}.py must not import {sorted(wrong)}"


def test_the_check_of_imports_sees_them():
    assert {"conditions", "priors", "augmentation"} <= own_imports("synthesis")
    assert "figures" in own_imports("run")  # inside a function


@pytest.mark.parametrize("name", ["figures", "run", "reproduce", "cli", "pages", "site"])
def test_plotting_and_running_know_no_model(name):
    below = {module.split(".")[0] for module in imports(name)}
    if name == "figures":
        assert "torch" not in below
        assert own_imports(name) <= {"files"}
    source = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    top = {
        alias.name for node in source.body if isinstance(node, ast.Import) for alias in node.names
    } | {node.module for node in source.body if isinstance(node, ast.ImportFrom)}
    assert not any(str(module).startswith("torch") for module in top)


def test_there_is_no_drawer_for_everything():
    assert not {"utils", "util", "helpers", "misc", "common"} & set(MODULES)


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
    module = importlib.import_module("dsvlib" if name == "__init__" else f"dsvlib.{name}")
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


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'synthesise'"):
        _ = dsvlib.synthesise


def python(code: str) -> str:
    """Run `code` in a fresh interpreter and return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_import_is_light():
    heavy = ["torch", "numpy", "pandas", "sklearn", "matplotlib", "torchvision", "scipy"]
    code = f"""
import json, sys
import dsvlib, dsvlib.cli
print(json.dumps([m for m in {heavy} if m in sys.modules]))
"""
    assert json.loads(python(code)) == []


def test_names_are_loaded_on_first_use_and_do_not_draw():
    code = """
import sys
import dsvlib
print("torch" in sys.modules)
dsvlib.SupportSet
print("torch" in sys.modules, "dsvlib.synthesis" in sys.modules)
for name in dsvlib.__all__:
    getattr(dsvlib, name)
print([m for m in ("matplotlib", "seaborn", "sklearn", "torchvision") if m in sys.modules])
"""
    assert python(code).split() == ["False", "True", "False", "[]"]


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
