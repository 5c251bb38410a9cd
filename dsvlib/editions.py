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

from dsvlib.files import atomic_path
from dsvlib.presets import notebook_names
from dsvlib.run import DsvError, explain, repository_root

EXERCISE = ("exercise", "solution", "test")
FIGURES = "build/student"  # a student's own run never takes the place of a published one


def tags(cell: Any) -> list[str]:
    """Return the tags of a cell."""
    return list(cell.metadata.get("tags", []))


def student_copy(notebook: Any, name: str) -> Any:
    """Return the student edition of a notebook called `name`; `notebook` itself is left as it is.

    Solutions, outputs and the digests of a run are gone; stubs, tests and hints stay. A line at the
    top says where the copy comes from, and a cell below it keeps its figures apart.
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
    apart = nbformat.v4.new_code_cell(
        "import os\n\nfrom dsvlib.run import repository_root\n\n"
        f'os.environ["DSV_FIGURES"] = str(repository_root() / "{FIGURES}")',
        id="student-figures",
    )
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


def launch_links(name: str) -> dict[str, str]:
    """Return where a student edition can be run in a browser: Binder and Colab.

    Both derive from the one address in CITATION.cff, `repository-code`; without it there are none.
    """
    path = repository_root() / "CITATION.cff"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(
        r"^repository-code:\s*[\"']?https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?[\"']?\s*$",
        text,
        re.MULTILINE,
    )
    if not found:
        return {}
    file = f"notebooks/student/{name}.ipynb"
    return {
        "Binder": f"https://mybinder.org/v2/gh/{found[1]}/HEAD?labpath={file}",
        "Colab": f"https://colab.research.google.com/github/{found[1]}/blob/HEAD/{file}",
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
