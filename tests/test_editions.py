"""Student editions hold no solution, keep the tests, and follow their notebooks."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from checkout import make_checkout

from companion.cli import main
from companion.notebooks import (
    FETCH,
    exercise_problems,
    launch_links,
    repository_code,
    student_copy,
    student_files,
    student_problems,
    write_student_copies,
)
from companion.presets import notebook_names
from dsvlib._errors import DsvError

ROOT = Path(__file__).resolve().parent.parent
STUB = 'def double(x):\n    """Return 2x."""\n    return None  # your code'
SOLUTION = "def double(x):\n    return 2 * x"
TEST = "assert double(3) == 6"


def cell(source: str, *tags: str, count: int | None = 1) -> Any:
    made = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})
    made.execution_count = count
    made.outputs = [nbformat.v4.new_output("stream", text="said 6\n")]
    return made


def with_exercise(*cells: Any) -> Any:
    """Return a notebook with these cells; by default a sound exercise."""
    notebook = nbformat.v4.new_notebook(
        metadata={
            "dsvlib": {"cells": "abc"},
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
        }
    )
    head = [nbformat.v4.new_markdown_cell("# 01"), cell("preset = 1", "parameters")]
    usual = (cell(STUB, "exercise"), cell(SOLUTION, "solution"), cell(TEST, "test"))
    notebook.cells = [*head, *(cells or usual)]
    return notebook


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_checkout(tmp_path, monkeypatch)
    nbformat.write(with_exercise(), root / "notebooks" / "02_double.ipynb")
    return root


def test_the_copy_has_neither_solutions_nor_outputs() -> None:
    notebook = with_exercise()
    before = nbformat.writes(notebook)
    student = student_copy(notebook, "02_double")
    nbformat.validate(student)
    assert nbformat.writes(notebook) == before, "the notebook itself is left as it is"
    sources = [c.source for c in student.cells]
    assert STUB in sources
    assert TEST in sources
    assert SOLUTION not in sources
    assert "dsvlib" not in student.metadata
    assert all(not c.outputs and c.execution_count is None for c in student.cells if "outputs" in c)
    assert "generated from [02_double](../02_double.ipynb)" in student.cells[1].source
    assert nbformat.writes(student) == nbformat.writes(student_copy(notebook, "02_double"))


def test_the_test_of_a_copy_fails_until_the_stub_is_completed() -> None:
    student = student_copy(with_exercise(), "02_double")
    exercise = "\n".join(c.source for c in student.cells if {"exercise", "test"} & tags_of(c))
    with pytest.raises(AssertionError):
        exec(exercise, {})
    exec(exercise.replace("return None", "return x + x"), {})


def tags_of(c: Any) -> set[str]:
    return set(c.metadata.get("tags", []))


def test_copies_are_written_and_kept_in_sync(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(student_problems()) == [
        "student/02_double.ipynb: not what its notebook gives; run dsv notebooks student"
    ]
    with pytest.raises(SystemExit) as end:
        main(["notebooks", "student"])
    assert end.value.code == 0
    assert capsys.readouterr().out == "student/02_double written\n"  # 01_line has no exercise
    assert list(student_problems()) == []
    copy = checkout / "notebooks" / "student" / "02_double.ipynb"
    text = copy.read_text()
    copy.write_text(text.replace("your code", "their code"))
    (copy.parent / "09_gone.ipynb").write_text(text)
    problems = "\n".join(student_problems())
    assert "02_double" in problems
    assert "09_gone" in problems
    assert write_student_copies() == ["02_double"]
    assert [path.name for path in copy.parent.iterdir()] == ["02_double.ipynb"]
    assert copy.read_text() == text
    assert notebook_names() == ["01_line", "02_double"], "a copy is no notebook of its own"


def test_a_broken_notebook_is_told(checkout: Path) -> None:
    (checkout / "notebooks" / "03_broken.ipynb").write_text("{")
    with pytest.raises(DsvError, match=r"03_broken.ipynb: expected a Jupyter notebook"):
        student_files()


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ((), None),
        ((cell(STUB, "exercise"), cell(TEST, "test")), "expected cells tagged 'solution'"),
        (
            (cell(STUB, "exercise"), cell("half = 1", "solution"), cell(TEST, "test")),
            "does not define ['double']",
        ),
        (
            (cell(STUB, "exercise"), cell(SOLUTION, "solution"), cell("double(3)", "test")),
            "does not assert",
        ),
        (
            (cell(STUB, "exercise"), cell(SOLUTION, "solution"), cell("assert 1", "test")),
            "does not assert anything of ['double']",
        ),
        (
            (cell(STUB, "exercise"), cell(SOLUTION, "solution", count=None), cell(TEST, "test")),
            "was not run",
        ),
        ((cell(SOLUTION, "solution"),), "does not belong to an exercise"),
    ],
)
def test_unsound_exercises_are_found(cells: tuple[Any, ...], problem: str | None) -> None:
    problems = "\n".join(exercise_problems(with_exercise(*cells)))
    assert problem in problems if problem else problems == ""


def test_every_notebook_has_exercises() -> None:  # check_notebooks says if they are sound
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        count = sum("exercise" in tags_of(c) for c in notebook.cells)
        assert 3 <= count <= 6, path.name


def test_links_come_from_one_line(checkout: Path) -> None:
    assert launch_links("02_double") == {}
    citation = checkout / "CITATION.cff"
    citation.write_text("title: x\nrepository-code: https://github.com/some-one/dsv.lib.git\n")
    assert repository_code() == "some-one/dsv.lib"
    links = launch_links("02_double")
    file = "notebooks/student/02_double.ipynb"
    assert links["Binder"].endswith(f"/gh/some-one/dsv.lib/HEAD?labpath={file}")
    assert links["Colab"].endswith(f"/github/some-one/dsv.lib/blob/HEAD/{file}")
    student = student_copy(with_exercise(), "02_double")
    assert f"[Colab]({links['Colab']})" in student.cells[1].source
    assert '"https://github.com/some-one/dsv.lib"' in student.cells[2].source
    compile(student.cells[2].source, "setup", "exec")
    citation.write_text("repository-code: http://example.org/x\n")
    with pytest.raises(DsvError, match=r"expected https://github.com/OWNER/NAME, got http://ex"):
        repository_code()


@pytest.mark.slow
def test_colab_s_first_cell_fetches_what_the_next_cells_import(tmp_path: Path) -> None:
    """Where Colab would clone from GitHub, this clones the checkout; nothing else is different."""
    state = ["git", "-C", str(ROOT), "rev-parse", "--is-inside-work-tree"]
    if subprocess.run(state, capture_output=True).returncode:
        pytest.skip("no git checkout to clone")
    fetch = FETCH.replace("https://github.com/OWNER/NAME", f"file://{ROOT}")
    packages = tmp_path / "packages"  # as they are on Colab: without this checkout
    packages.mkdir()
    for path in Path(site.getsitepackages()[0]).iterdir():
        if not path.name.startswith(("dsvlib", "_dsvlib")):
            (packages / path.name).symlink_to(path)
    code = f"{fetch}\nimport companion, dsvlib\nprint(dsvlib.__file__, companion.__file__)"
    code += "\nprint(dsvlib.load_classifier('cifar10-robust')[1]['test_accuracy'] > 0.7)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages), "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    *_, where, found = ran.stdout.splitlines()
    assert all(path.startswith(f"{tmp_path}/dsvlib-repository/") for path in where.split())
    assert found == "True"


def test_binder_builds_for_a_cpu_and_checks_itself() -> None:
    post = ROOT / ".binder" / "postBuild"
    assert post.stat().st_mode & 0o111, "repo2docker runs it"
    text = post.read_text()
    assert text.startswith("#!")
    assert "--torch-backend cpu" in text
    assert "--require-hashes" in text
