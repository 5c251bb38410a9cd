"""Committed outputs come from the present code, and two equal runs give the same bytes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from checkout import BODY, END, publish, write_notebook
from PIL import Image

from companion.notebooks import (
    NARROW,
    _normalise_output,
    check_notebooks,
    less_wide,
    refresh_notebooks,
)
from companion.presets import notebook_names, plan
from companion.workflow import forget, reproduce, up_to_date
from dsvlib._errors import DsvError

pytestmark = pytest.mark.usefixtures("checkout")


def test_committed_notebooks_are_clean_and_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV_ROOT")  # the real checkout
    assert notebook_names()
    assert check_notebooks() == []


def run_without_kernel(outputs: list[nbformat.NotebookNode]) -> None:
    """Leave what a run of 01_line does: a record, and papermill's notebook with these outputs."""
    (job,) = plan()
    publish(job)
    root = job.build("").parents[3]
    notebook = nbformat.read(root / "notebooks" / "01_line.ipynb", as_version=4)
    notebook.metadata["papermill"] = {"start_time": "2026-01-01T00:00:00"}
    injected = nbformat.v4.new_code_cell("steps = 5", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(2, injected)
    for count, cell in enumerate(notebook.cells[1:], 7):
        cell.metadata |= {"papermill": {"duration": 0.1}, "execution": {"iopub": "now"}}
        cell.metadata.setdefault("tags", [])
        cell.execution_count = count
    notebook.cells[3].outputs = outputs
    job.build(".ipynb").parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, job.build(".ipynb"))


def test_refresh_keeps_what_is_equal_between_two_equal_runs(checkout: Path) -> None:
    output = nbformat.v4.new_output
    library = f"{Path.home()}/lib/site-packages/torch/nn.py"
    picture = {"image/png": "AAAA", "image/svg+xml": "<svg/>", "text/plain": "A line"}
    run_without_kernel(
        [
            output("stream", name="stderr", text="100%|####| 5/5 [00:01<00:00, 5.00it/s]\n"),
            output("stream", name="stderr", text="50%| 5.00it/s]\nUserWarning: odd\n"),
            output("stream", name="stdout", text=f"in {checkout}/build, of {library}, 40% done\n"),
            output("display_data", data=picture, metadata={"image/png": {"alt": "A line rises"}}),
            output("display_data", data={"application/vnd.jupyter.widget-view+json": {}}),
            output("execute_result", data={"text/plain": "<x at 0x7f00>"}, execution_count=9),
        ]
    )
    assert refresh_notebooks() == ["01_line"]
    assert check_notebooks() == []
    notebook = nbformat.read(checkout / "notebooks" / "01_line.ipynb", as_version=4)
    assert "papermill" not in notebook.metadata
    code = notebook.cells[1:]
    assert [cell.execution_count for cell in code] == [1, 2, 3]
    assert [dict(cell.metadata) for cell in code] == [{"tags": ["parameters"]}, {}, {}]
    warning, printed, shown, result = code[1].outputs
    assert warning.text == "UserWarning: odd\n"
    assert printed.text == "in build, of site-packages/torch/nn.py, 40% done\n"
    assert set(shown.data) == {"image/png", "text/plain"}
    assert result.data["text/plain"] == "<x at 0x…>"
    assert result.execution_count == 2


def test_text_that_was_mended_after_the_run_is_kept(checkout: Path) -> None:
    run_without_kernel([nbformat.v4.new_output("stream", text="5 steps\n")])
    path = checkout / "notebooks" / "01_line.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source += ", mended"
    notebook.cells.append(nbformat.v4.new_markdown_cell("And more."))
    nbformat.write(notebook, path)
    assert refresh_notebooks() == ["01_line"]
    refreshed = nbformat.read(path, as_version=4).cells
    assert [c.source for c in refreshed] == [c.source for c in notebook.cells]
    assert refreshed[2].outputs[0].text == "5 steps\n"


def test_outputs_of_an_older_run_than_the_figures_are_refused(checkout: Path) -> None:
    run_without_kernel([])
    (job,) = plan()
    path = checkout / "notebooks" / "01_line.ipynb"
    before = path.read_bytes()
    forget([job], force=True)  # as a later run does that was interrupted then
    assert not up_to_date(job), "so that dsv reproduce runs it again"
    with pytest.raises(DsvError, match=r"the run that made the figures.*--only 01_line --force"):
        refresh_notebooks()
    assert path.read_bytes() == before
    run_without_kernel([])
    assert up_to_date(job)
    assert refresh_notebooks() == ["01_line"]


def test_outputs_go_stale_with_the_code(checkout: Path) -> None:
    assert any("not of the present code" in problem for problem in check_notebooks())
    with pytest.raises(DsvError, match=r"found none .*--preset quick --only 01_line --force"):
        refresh_notebooks()
    run_without_kernel([])
    refresh_notebooks()
    path = checkout / "notebooks" / "01_line.ipynb"
    first = path.read_bytes()
    assert up_to_date(plan()[0]), "outputs are no code"
    refresh_notebooks()
    assert path.read_bytes() == first
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].source += "\n"
    nbformat.write(notebook, path)
    assert any("not of the present code" in problem for problem in check_notebooks())
    with pytest.raises(DsvError, match="expected outputs of the present code"):
        refresh_notebooks()


def test_check_notebooks_finds_each_problem(checkout: Path) -> None:
    path = write_notebook(checkout, "01_line", "\n".join(["x = 1"] * 41), "pass")
    notebook = nbformat.read(path, as_version=4)
    output = nbformat.v4.new_output
    notebook.cells[0].source = "# About DSV-F99"
    notebook.cells[3].source = 'run.record("DSV-F5a", "x", 1)'
    notebook.cells.append(nbformat.v4.new_code_cell("1", metadata={"tags": ["solution"]}))
    notebook.cells += [nbformat.v4.new_markdown_cell("word " * 60) for _ in range(80)]
    notebook.cells[2].outputs = [
        output("stream", text="saved in /home/someone/x.png"),
        output("error", ename="ValueError", evalue="", traceback=[]),
        output("display_data", data={"image/png": "AAAA", "image/svg+xml": "<svg/>"}),
    ]
    nbformat.write(notebook, path)
    (checkout / "notebooks" / "02_broken.ipynb").write_text("{")
    problems = "\n".join(check_notebooks())
    for expected in (
        "01_line: cell 2 has 41 lines",
        "shows the path /home/someone/x.png",
        "ends in ValueError",
        "image without alt text",
        "shows an SVG",
        "call run.complete()",
        "header names ['DSV-F99']; expected claims of claims.yml",
        "header does not name ['DSV-F5a']",
        "does not belong to an exercise",
        "has 85 cells and 4803 words",
        "not of the present code",
        "02_broken.ipynb: expected a Jupyter notebook",
    ):
        assert expected in problems


@pytest.mark.parametrize(("cells", "lines"), [(3, 12), (3, 13), (42, 12), (40, 12)])
def test_long_cells_and_long_notebooks_are_found(cells: int, lines: int, checkout: Path) -> None:
    write_notebook(checkout, "01_line", *["\n".join(["x = 1", ""] * lines)] * cells)
    found = [problem for problem in check_notebooks() if "in the median cell" in problem]
    assert bool(found) == (lines > 12 or cells * lines > 500)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("no claim", "header names no claim"),
        ("DSV-F1 alone", "does not name ['DSV-F5a']"),
        ("DSV-F1 and DSV-F5, of which F5a is a part", ""),
    ],
)
def test_the_header_names_what_the_code_records(header: str, problem: str, checkout: Path) -> None:
    path = write_notebook(checkout, "01_line", 'run.record("DSV-F5a", "x", 1)', END)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = header
    nbformat.write(notebook, path)
    problems = [p for p in check_notebooks() if "header" in p]
    assert len(problems) == bool(problem)
    assert problem in "".join(problems)


@pytest.mark.slow
def test_refreshed_notebook_is_clean(checkout: Path) -> None:
    path = write_notebook(checkout, "01_line", BODY, END)
    assert reproduce(echo=lambda _: None)
    refresh_notebooks()
    assert check_notebooks() == []
    assert str(checkout).encode() not in path.read_bytes()
    outputs = [o for cell in nbformat.read(path, as_version=4).cells[1:] for o in cell.outputs]
    assert "steps 5" in str(outputs)
    assert "it/s" not in str(outputs)
    first = path.read_bytes()
    assert reproduce(force=True, echo=lambda _: None)
    refresh_notebooks()
    assert path.read_bytes() == first


@pytest.mark.parametrize("where", ["/opt/env/lib/", ".venv/lib/python3.11/", ".venv"])
def test_outputs_do_not_say_where_packages_lie(where: str) -> None:
    stream = nbformat.v4.new_output("stream", name="stderr", text=f"{where}/site-packages/a.py: b")
    assert _normalise_output(stream).text == "site-packages/a.py: b"


def test_a_large_picture_on_paper_stays_on_white_paper() -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((300, 400, 3), 255, dtype=np.uint8)
    pixels[30:-30, 30:-30] = rng.integers(0, 256, (240, 340, 3))
    made = less_wide(Image.fromarray(pixels), (400,), 1000, {"Description": "noise"})
    with Image.open(io.BytesIO(made)) as opened:
        assert (opened.mode, opened.size, opened.text) == (
            "P",
            (400, 300),
            {"Description": "noise"},
        )
        assert (np.asarray(opened.convert("RGB"))[:20] == 255).all()


def test_large_pictures_are_committed_at_the_width_they_are_shown_at() -> None:
    rng = np.random.default_rng(0)
    large = Image.fromarray(17 * rng.integers(0, 16, (400, 600, 3), dtype=np.uint8))

    def output(picture: Image.Image, width: int, **options: Any) -> nbformat.NotebookNode:
        file = io.BytesIO()
        picture.save(file, "png", **options)
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        about = {"image/png": {"alt": "three words here", "width": width}}
        return nbformat.v4.new_output("display_data", data, metadata=about)

    def size(made: nbformat.NotebookNode) -> tuple[int, int]:
        with Image.open(io.BytesIO(base64.b64decode(made.data["image/png"]))) as opened:
            assert getattr(opened, "n_frames", 1) == 1
            return opened.size

    assert size(_normalise_output(output(large, 300))) == (300, 200)
    assert size(_normalise_output(output(large, 400))) == (400, 267)
    assert size(_normalise_output(output(large, 600))) == (600, 400)
    wide = (NARROW, round(NARROW * 400 / 600))  # photographs cost most and lose least
    wider = large.resize((900, 600))
    assert size(_normalise_output(output(wider, 600))) == wide
    still = _normalise_output(output(large, 600, save_all=True, append_images=[large.rotate(90)]))
    assert size(still) == wide  # of an animation, its last frame
    small = output(large.crop((0, 0, 60, 40)), 30)
    assert _normalise_output(small).data == small.data
