"""A small checkout for tests of what runs notebooks: one notebook, two presets, records."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import yaml

from companion import blind_test
from companion.presets import Job
from companion.runs import Run, code_digest, repository_root
from companion.workflow import done

COMMON = 'preset: str = "quick"\nseed: int = 0\ndevice: str = "auto"\ndata_root: str = ""\n'
PARAMETERS = COMMON + "steps: int = 5  # more is better\nrate: float = 0.1\nnames: list[str] = []"
BODY = """
import sys
from matplotlib.figure import Figure
from companion.runs import Run
run = Run.start("01_line", preset=preset, seed=seed, parameters={"steps": steps, "rate": rate})
print("steps", steps, file=sys.stdout)
print("100%|####| 5/5 [00:01<00:00, 5.00it/s]", file=sys.stderr)
fig = Figure(figsize=(3, 2))
fig.add_subplot().plot([0, steps])
run.record("K1", "steps", steps, paper=7)
run.save_figure(fig, "line", alt="A straight line that rises")
"""
END = "run.complete()"


def make_checkout(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `root` the checkout that dsvlib works in for the rest of a test."""
    for name in ("DSV_FIGURES", "DSV_RUN_ID", "DSV_RUN_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DSV_ROOT", str(root))
    (root / "notebooks").mkdir()
    write_notebook(root, "01_line", BODY, END)
    write_presets(root, smoke={"notebooks": {"01_line": {"steps": 2}}})
    return root


def write_notebook(root: Path, name: str, *sources: str, parameters: str = PARAMETERS) -> Path:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook.cells = [nbformat.v4.new_markdown_cell(f"# {name}\n\nDSV-F1"), first, *cells]
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def write_presets(root: Path, **presets: Any) -> None:
    content = {"presets": {"quick": {"description": "all"}} | presets}
    (root / "notebooks" / "presets.yml").write_text(yaml.safe_dump(content))


@contextmanager
def whole_run(directory: Path, run_id: str = "") -> Iterator[None]:
    """Let `Run.start` think that it is in a whole run that publishes to `directory`."""
    context = {
        "directory": os.path.relpath(directory, repository_root()),
        "code": code_digest(directory.name),
        "command": f"dsv reproduce --preset {directory.parent.name} --only {directory.name}",
        "started": time.time() - 70,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSV_RUN_CONTEXT", json.dumps(context))
        patch.setenv("DSV_RUN_ID", run_id)
        yield


def publish(job: Job, run_id: str = "", *, steps: float = 5) -> Path:
    """Publish in this process what a kernel would have, and leave what a whole run leaves."""
    publish_at(job.directory, run_id, steps=steps, seed=job.parameters["seed"])
    nbformat.write(nbformat.v4.new_notebook(), job.build(".ipynb"))  # papermill's
    if not run_id:  # else the workflow does
        done(job).touch()
    return job.directory


def publish_at(directory: Path, run_id: str = "", *, steps: float = 5, seed: int = 0) -> None:
    """Publish a small run to any place of whole runs."""
    with whole_run(directory, run_id):
        run = Run.start(directory.name, preset=directory.parent.name, seed=seed)
        run.record("K1", "steps", steps, std=0.5, unit="%", paper=7)
        run.complete()


def small_blind_test(seed: int = 0, per_class: int = 2) -> blind_test.BlindTest:
    """Return a set of three classes whose pictures can be told by their level, controls by none.

    The judge reads all but the first support vector, and every control as a cat.
    """
    asked = ["cat", "dog", "frog"] * per_class
    levels = np.array([0.2, 0.5, 0.8] * per_class).reshape(-1, 1, 1, 1)
    plain = np.broadcast_to(levels, (len(asked), 3, 4, 4))
    noise = np.random.default_rng(seed).uniform(size=plain.shape)
    groups = [
        blind_test.Group("support vector", plain, asked, ["frog", *asked[1:]], "a classifier"),
        blind_test.Group("control", noise, asked, ["cat"] * len(asked), "an untrained network"),
        blind_test.Group("real", plain, asked, asked, "test pictures"),
    ]
    return blind_test.make(groups, torch.Generator().manual_seed(seed))
