"""The committed notebooks and README: results of a run put into them, normalised, and checked.

Two equal runs give the same bytes, and `check_notebooks` says where outputs are older than the
code that they claim to come from.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from companion.editions import exercise_problems, student_problems
from companion.execution import exclusive
from companion.ledger.claims import claim_ids
from companion.presets import notebook_names, plan, read_parameters, read_presets
from companion.runs import code_cells, digest, library_digest, repository_root
from companion.workflow import up_to_date
from dsvlib._errors import DsvError
from dsvlib._files import atomic_path

MAX_CELL_LINES = 40
MAX_CELLS, MAX_WORDS = 80, 4500  # beyond, a notebook is two
CLAIM = re.compile(r"\b(?:DSV|PDD|EXT|TEACH)-[A-Z0-9]\w*")
PROGRESS = re.compile(r"\d%\||\d(it|s)/(s|it)\b|\dit \[")
PRIVATE = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|private|mnt|opt|usr|var|work)/\S+")


def refresh_notebooks(preset: str = "quick", only: Sequence[str] = ()) -> list[str]:
    """Put the outputs of a preset's run, normalised, into the committed notebooks.

    Returns the names refreshed. Raises DsvError, before writing any, if a notebook has not been run
    here with the present code (`companion.workflow.up_to_date`).
    """
    import nbformat

    ready = []
    with exclusive(uuid.uuid4().hex):
        for job in plan(preset, only=only):
            if job.repetition is not None:
                continue
            if not up_to_date(job):
                fix = f"run dsv reproduce --preset {preset} --only {job.notebook} --force"
                raise DsvError(
                    f"{job.notebook}: expected outputs of the present code and of the run that "
                    f"made the figures, found none in build/runs/{preset}; {fix}"
                )
            target = repository_root() / "notebooks" / f"{job.notebook}.ipynb"
            executed = nbformat.read(job.build(".ipynb"), as_version=4)
            ready.append((target, normalise(executed, target)))
        for target, notebook in ready:
            with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8") as out:
                nbformat.write(notebook, out)
    return [target.stem for target, _ in ready]


def normalise(executed: Any, source: Path) -> Any:
    """Strip from an executed notebook what differs between two equal runs.

    That is papermill's own cell and metadata, times, paths, progress lines and a second copy of
    each picture as SVG.
    """
    executed.cells = [
        cell
        for cell in executed.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    executed.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "dsvlib": {"cells": digest(code_cells(source)), "library": library_digest()},
    }
    number = 0
    for cell in executed.cells:
        for key in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill adds an empty list
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            cell.outputs = [o for o in map(_normalise_output, cell.outputs) if o is not None]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = number
    return executed


def _normalise_output(output: Any) -> Any:
    """Return the output without progress, private paths and addresses; None if nothing is left."""
    if output.output_type == "stream":
        lines = output.text.splitlines(keepends=True)
        if output.name == "stderr":
            lines = [line for line in lines if not PROGRESS.search(line)]
        output.text = _without_paths("".join(lines))
        return output if output.text.strip() else None
    if "data" in output:
        for kind in list(output.data):
            if kind == "image/svg+xml" or "widget" in kind:
                del output.data[kind]
            elif isinstance(output.data[kind], str) and kind.startswith("text/"):
                output.data[kind] = _without_paths(output.data[kind])
        return output if output.data else None
    return output


def _without_paths(text: str) -> str:
    text = text.replace(f"{repository_root()}{os.sep}", "").replace(str(repository_root()), ".")
    text = re.sub(r"/\S*/site-packages/", "site-packages/", text)
    return re.sub(r"\bat 0x[0-9a-f]+", "at 0x…", text.replace(str(Path.home()), "~"))


def check_notebooks() -> list[str]:
    """Return what is wrong with the committed notebooks and the presets, one sentence each."""
    import nbformat

    problems = []
    for name in notebook_names():
        path = repository_root() / "notebooks" / f"{name}.ipynb"
        try:
            read_parameters(name)
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
        except (DsvError, nbformat.ValidationError, nbformat.reader.NotJSONError) as error:
            problems.append(str(error).split("\n")[0])
            continue
        problems += [f"{name}: {problem}" for problem in _check_notebook(path, notebook)]
    with suppress(DsvError):  # a notebook that cannot be read is listed above
        problems += student_problems()
    try:
        for preset, content in read_presets().items():
            if not set(notebook_names()) <= set(content["omit"]):
                plan(preset)
    except DsvError as error:
        if str(error) not in problems:
            problems.append(str(error))
    return problems


def _check_notebook(path: Path, notebook: Any) -> Iterator[str]:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    wanted = {"cells": digest(code_cells(path)), "library": library_digest()}
    if notebook.metadata.get("dsvlib") != wanted:
        yield "its outputs are not of the present code; run dsv reproduce, dsv notebooks refresh"
    if "papermill" in notebook.metadata or len(code) != len(code_cells(path)):
        yield "papermill's cell or metadata is in it; run dsv notebooks refresh"
    if not any(".complete()" in cell.source for cell in code[-1:]):
        yield "expected the last code cell to call run.complete()"
    yield from _check_claims(notebook)
    yield from exercise_problems(notebook)
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type != "code")
    if len(notebook.cells) > MAX_CELLS or words > MAX_WORDS:
        yield (
            f"has {len(notebook.cells)} cells and {words} words; expected at most {MAX_CELLS} and "
            f"{MAX_WORDS}, make two of it"
        )
    for index, cell in enumerate(notebook.cells):
        where = f"cell {index}"
        if cell.cell_type != "code":
            continue
        lines = len(cell.source.splitlines())
        if lines > MAX_CELL_LINES:
            yield f"{where} has {lines} lines; expected at most {MAX_CELL_LINES}, move code out"
        for output in cell.outputs:
            yield from (f"{where} {problem}" for problem in _check_output(output))


def _check_claims(notebook: Any) -> Iterator[str]:
    """Say which claims the header (all above the first code cell) lacks or names wrongly."""
    text: dict[bool, str] = {True: "", False: ""}
    above = True
    for cell in notebook.cells:
        above = above and cell.cell_type != "code"
        if above or cell.cell_type == "code":
            text[above] += cell.source + "\n"
    named = set(CLAIM.findall(text[True]))
    if not named:
        yield "its header names no claim; say which claim of claims.yml it is about"
        return
    if unknown := sorted(named - claim_ids()):
        yield f"its header names {unknown}; expected claims of claims.yml, add or correct them"
    # a part of a claim, DSV-F5a, may be recorded where the header names the whole
    recorded = {claim for claim in CLAIM.findall(text[False]) if not claim.startswith(tuple(named))}
    if recorded:
        yield f"its header does not name {sorted(recorded)}, which its code records"


def _check_output(output: Any) -> Iterator[str]:
    if output.output_type == "error":
        yield f"ends in {output.ename}"
    data = output.get("data", {})
    texts = [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]
    for text in texts:
        if found := PRIVATE.search(str(text)):
            yield f"shows the path {found.group()}; paths differ between machines"
    if "image/svg+xml" in data:
        yield "shows an SVG; expected PNG only"
    if "image/png" in data and not output.metadata.get("image/png", {}).get("alt"):
        yield "shows an image without alt text; end the cell with run.save_figure(…)"
