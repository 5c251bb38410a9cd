"""Editions of a notebook, generated from its cells' tags: one source, nothing typed twice.

An exercise is three code cells in a row, tagged `exercise` (a stub to complete), `solution` and
`test`. The committed notebook holds and runs all three; the student edition leaves the solutions
and all outputs out and keeps the tests, which fail until the stub is completed.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from companion.presets import notebook_names
from companion.runs import repository_root
from dsvlib._errors import DsvError, explain
from dsvlib._files import atomic_path

EXERCISE = ("exercise", "solution", "test")
# A student's own run never takes the place of a published one.
APART = """from companion.runs import repository_root

os.environ["DSV_FIGURES"] = str(repository_root() / "build" / "student")"""
FETCH = """import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("dsvlib") is None:  # Colab starts without the repository
    clone = ["git", "clone", "--depth", "1", "https://github.com/OWNER/NAME", "dsvlib-repository"]
    subprocess.run(clone, check=True)
    sys.path.insert(0, os.path.abspath("dsvlib-repository"))

"""


def tags(cell: Any) -> list[str]:
    """Return the tags of a cell."""
    return list(cell.metadata.get("tags", []))


def student_copy(notebook: Any, name: str) -> Any:
    """Return the student edition of a notebook called `name`; `notebook` itself is left as it is.

    Solutions, outputs and the digests of a run are gone; stubs, tests and hints stay. A line at the
    top says where the copy comes from; the cell below it keeps its figures apart and, on Colab,
    fetches the repository.
    """
    import nbformat

    student = copy.deepcopy(notebook)
    student.metadata = nbformat.from_dict(
        {key: value for key, value in student.metadata.items() if key != "dsvlib"}
    )
    student.cells = [cell for cell in student.cells if "solution" not in tags(cell)]
    for cell in student.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    about = nbformat.v4.new_markdown_cell(_header(name), id="student-about")
    apart = nbformat.v4.new_code_cell(_setup(), id="student-setup")
    student.cells[1:1] = [about, apart]
    return student


def _header(name: str) -> str:
    badges = " · ".join(f"[{label}]({url})" for label, url in launch_links(name).items())
    return (
        f"> **Student edition**, generated from [{name}](../{name}.ipynb) by `dsv notebooks "
        f"student`: edit that one. Each exercise has a stub to complete and a test below it that "
        f"fails until you have; the solutions are in the original."
        + (f"\n>\n> Run it on {badges}." if badges else "")
    )


def _setup() -> str:
    """Return the code that a copy starts with."""
    repository = repository_code()
    return (FETCH.replace("OWNER/NAME", repository) if repository else "import os\n\n") + APART


def repository_code() -> str:
    """Return GitHub's ``owner/name`` from `repository-code` in CITATION.cff, or an empty text.

    All links to the repository derive from this one line.
    """
    path = repository_root() / "CITATION.cff"
    citation = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    address = str(citation.get("repository-code") or "")
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    if address and not found:
        raise DsvError(
            f"CITATION.cff: repository-code: expected https://github.com/OWNER/NAME, got {address}"
        )
    return found[1] if found else ""


def launch_links(name: str) -> dict[str, str]:
    """Return where a student edition runs in a browser; nothing if no repository is named."""
    repository, file = repository_code(), f"notebooks/student/{name}.ipynb"
    if not repository:
        return {}
    return {
        "Binder": f"https://mybinder.org/v2/gh/{repository}/HEAD?labpath={file}",
        "Colab": f"https://colab.research.google.com/github/{repository}/blob/HEAD/{file}",
    }


def student_files() -> dict[Path, str]:
    """Return what each student copy must hold: path → text, for notebooks that have exercises."""
    import nbformat

    files = {}
    for name in notebook_names():
        source = repository_root() / "notebooks" / f"{name}.ipynb"
        try:
            notebook = nbformat.read(source, as_version=4)
        except nbformat.reader.NotJSONError as error:
            reason = str(error).split("\n")[0]
            raise DsvError(f"{source.name}: expected a Jupyter notebook, got {reason}") from error
        if any("exercise" in tags(cell) for cell in notebook.cells):
            target = source.parent / "student" / source.name
            files[target] = nbformat.writes(student_copy(notebook, name)) + "\n"
    return files


def write_student_copies() -> list[str]:
    """Write ``notebooks/student/NN_*.ipynb``, remove those without a source; return the names."""
    files = student_files()
    folder = repository_root() / "notebooks" / "student"
    with explain("write to", folder):
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        for stale in set(folder.glob("*.ipynb")) - set(files):
            stale.unlink()
    return [path.stem for path in files]


def student_problems() -> Iterator[str]:
    """Say which committed student copies are not what their notebooks give."""
    files = student_files()
    present = set((repository_root() / "notebooks" / "student").glob("*.ipynb"))
    for path in sorted(present | set(files)):
        if path not in present or path.read_text(encoding="utf-8") != files.get(path):
            yield f"student/{path.name}: not what its notebook gives; run dsv notebooks student"


def exercise_problems(notebook: Any) -> Iterator[str]:
    """Say what is wrong with a notebook's exercises.

    Each is stub, solution and test, one after the other; the solution defines what the stub does,
    has been run, and the test calls it and asserts something.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kinds = [next((kind for kind in EXERCISE if kind in tags(cell)), "") for cell in code]
    used = 0
    for index, kind in enumerate(kinds):
        if kind != "exercise":
            continue
        used += 3
        if tuple(kinds[index : index + 3]) != EXERCISE:
            yield (
                f"exercise in code cell {index}: expected cells tagged 'solution' and 'test' after "
                f"it, got {kinds[index + 1 : index + 3]}"
            )
            continue
        stub, solution, test = code[index : index + 3]
        names = _defined(stub.source)
        if not names <= _defined(solution.source):
            yield f"the solution in code cell {index + 1} does not define {sorted(names)}"
        if not _asserts(test.source) or not names & _read(test.source):
            yield f"the test in code cell {index + 2} does not assert anything of {sorted(names)}"
        if not (solution.execution_count and test.execution_count):
            yield f"the exercise in code cell {index} was not run with its solution"
    if used != sum(bool(kind) for kind in kinds):
        yield "a cell tagged 'solution' or 'test' does not belong to an exercise"


def _defined(source: str) -> set[str]:
    body = ast.parse(source).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _read(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def _asserts(source: str) -> bool:
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and node.attr.startswith("assert_"))
        for node in ast.walk(ast.parse(source))
    )
