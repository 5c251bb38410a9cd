"""The committed notebooks: outputs of a run put into them, normalised, checked, and their editions.

Two equal runs give the same bytes, and `check_notebooks` says where outputs are older than the
code that they claim to come from.

An exercise is three code cells in a row, tagged `exercise` (a stub to complete), `solution` and
`test`. The committed notebook holds and runs all three; the student edition leaves the solutions
and all outputs out and keeps the tests, which fail until the stub is completed.
"""

from __future__ import annotations

import ast
import base64
import copy
import io
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from companion.execution import exclusive
from companion.ledger.claims import claim_ids
from companion.ledger.prose import PICTURE, plain
from companion.presets import notebook_names, plan, read_parameters, read_presets
from companion.runs import code_cells, digest, library_digest, repository_root
from companion.workflow import up_to_date
from dsvlib._errors import DsvError, explain
from dsvlib._files import atomic_path

MAX_CELL_LINES = 40
LARGE = 50_000  # bytes of a picture that is made smaller before it is committed in an output
PHOTOGRAPHS, NARROW = 110_000, 480  # bytes of one that is made smaller still, and its width then
MAX_CELLS, MAX_WORDS, MAX_LINES = 65, 4500, 500  # beyond, a notebook is two
MAX_MEDIAN = 12  # lines of the code cell in the middle: one thought a cell
CLAIM = re.compile(r"\b(?:DSV|PDD|EXT|TEACH)-[A-Z0-9]\w*")
PROGRESS = re.compile(r"\d%\||\d(it|s)/(s|it)\b|\dit \[")
PRIVATE = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|private|mnt|opt|usr|var|work)/\S+")
EXERCISE = ("exercise", "solution", "test")
FETCH = """import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("dsvlib") is None:  # Colab starts without the repository
    clone = ["git", "clone", "--depth", "1", "https://github.com/OWNER/NAME", "dsvlib-repository"]
    subprocess.run(clone, check=True)
    sys.path.insert(0, os.path.abspath("dsvlib-repository"))"""


def read_notebook(path: Path) -> Any:
    """Return a notebook; raise DsvError for a file that is none."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        reason = str(error).split("\n")[0]
        raise DsvError(f"{path.name}: expected a Jupyter notebook, got {reason}") from error


def refresh_notebooks(
    preset: str = "quick",
    only: Sequence[str] = (),
    *,
    device: str | None = None,
    data_root: str | None = None,
) -> list[str]:
    """Put the outputs of a preset's run, normalised, into the committed notebooks.

    `device` and `data_root` are those of the run. Returns the names refreshed. Raises DsvError,
    before writing any, if a notebook has not been run here with the present code
    (`companion.workflow.up_to_date`).
    """
    import nbformat

    ready = []
    with exclusive(uuid.uuid4().hex):
        for job in plan(preset, only=only, device=device, data_root=data_root):
            if job.repetition is not None:
                continue
            if not up_to_date(job):
                fix = f"run dsv reproduce --preset {preset} --only {job.notebook} --force"
                raise DsvError(
                    f"{job.notebook}: expected outputs of the present code and of the run that "
                    f"made the figures, found none in build/runs/{preset}; {fix}"
                )
            target = repository_root() / "notebooks" / f"{job.notebook}.ipynb"
            ready.append((target, normalise(read_notebook(job.build(".ipynb")), target)))
        for target, notebook in ready:
            with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8") as out:
                nbformat.write(notebook, out)
    return [target.stem for target, _ in ready]


def normalise(executed: Any, source: Path) -> Any:
    """Strip from an executed notebook what differs between two equal runs.

    That is papermill's own cell and metadata, times, paths, progress lines and a second copy of
    each picture as SVG. The text between the cells is that of `source`, if code is the same.
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
    executed.cells = _with_present_text(executed.cells, source)
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


def _with_present_text(cells: list[Any], source: Path) -> list[Any]:
    """Return executed cells among the present text, which may have been mended since the run."""
    present = read_notebook(source).cells
    ran = [cell for cell in cells if cell.cell_type == "code"]
    if [cell.source for cell in ran] != [c.source for c in present if c.cell_type == "code"]:
        return cells  # outputs of other code: the digest tells
    code = iter(ran)
    return [next(code) if cell.cell_type == "code" else cell for cell in present]


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
            elif kind == "image/png":
                output.data[kind] = _as_shown(output.data[kind], output.metadata.get(kind, {}))
            elif isinstance(output.data[kind], str) and kind.startswith("text/"):
                output.data[kind] = _without_paths(output.data[kind])
        return output if output.data else None
    return output


def _as_shown(png: str, about: Any) -> str:
    """Return a large picture (base64) at the width at which the notebook shows it.

    The figure itself lies below figures/; of an animation the last frame is left.
    """
    raw, width = base64.b64decode(png), about.get("width")
    if len(raw) <= LARGE or not width:
        return png
    with Image.open(io.BytesIO(raw)) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1:
            picture.seek(frames - 1)
        elif picture.width <= width:
            return png
        full = picture.convert("RGB")
    small = less_wide(full, (width, min(width, NARROW)), PHOTOGRAPHS)
    made = base64.b64encode(small).decode("ascii")
    return min(made, png, key=len)  # smoothing can cost more than pixels save


def less_wide(
    picture: Image.Image, widths: Sequence[int], most: int, text: Mapping[str, str] | None = None
) -> bytes:
    """Return an RGB picture as PNG, with `text` in it, at the first width of at most `most` bytes.

    At the last one where there is none, in 256 dithered colours. Photographs of 32 pixels, drawn
    smoothly at four times their size, cost megabytes and say no more.
    """
    from companion.figures import compact

    for wide in widths:
        raw, height = io.BytesIO(), round(picture.height * wide / picture.width)
        resized = picture.resize((wide, height), Image.Resampling.LANCZOS)
        resized.save(raw, "png")
        small = compact(raw.getvalue(), text or {})
        if len(small) <= most:
            return small
    few = resized.quantize(palette=resized.quantize(256, Image.Quantize.MEDIANCUT))  # dithered
    colours = np.array(few.getpalette() or []).reshape(-1, 3)
    colours[(colours >= 248).all(axis=1)] = 255  # paper is white; median cut makes it bluish
    few.putpalette(colours.astype(np.uint8).tobytes())
    made, about = io.BytesIO(), PngInfo()
    for name, value in (text or {}).items():
        about.add_itxt(name, value)
    few.save(made, "png", optimize=True, pnginfo=about)
    return made.getvalue()


def _without_paths(text: str) -> str:
    text = text.replace(f"{repository_root()}{os.sep}", "").replace(str(repository_root()), ".")
    text = re.sub(r"\S*/site-packages/", "site-packages/", text)
    return re.sub(r"\bat 0x[0-9a-f]+", "at 0x…", text.replace(str(Path.home()), "~"))


def check_notebooks() -> list[str]:
    """Return what is wrong with the committed notebooks and the presets, one sentence each."""
    import nbformat

    problems = []
    for name in notebook_names():
        path = repository_root() / "notebooks" / f"{name}.ipynb"
        try:
            read_parameters(name)
            notebook = read_notebook(path)
            nbformat.validate(notebook)
        except (DsvError, nbformat.ValidationError) as error:
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
    texts = [plain(cell.source) for cell in notebook.cells if cell.cell_type != "code"]
    words = sum(len(text.split()) for text in texts)
    if len(notebook.cells) > MAX_CELLS or words > MAX_WORDS:
        yield (
            f"has {len(notebook.cells)} cells and {words} words; expected at most {MAX_CELLS} and "
            f"{MAX_WORDS}, make two of it"
        )
    lengths = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in code]
    if sum(lengths) > MAX_LINES or (lengths and median(lengths) > MAX_MEDIAN):
        yield (
            f"has {sum(lengths)} lines of code, {median(lengths):g} in the median cell; expected "
            f"at most {MAX_LINES} and {MAX_MEDIAN}, split cells or move code out"
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


def tags(cell: Any) -> list[str]:
    """Return the tags of a cell."""
    return list(cell.metadata.get("tags", []))


# --- student editions -----------------------------------------------------------------------------


def leave_out_sources(notebook: Any) -> None:
    """Take the comments that name where numbers come from out of the text, in place."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)


def student_copy(notebook: Any, name: str) -> Any:
    """Return the student edition of a notebook called `name`; `notebook` itself is left as it is.

    Solutions, outputs and the digests of a run are gone; stubs, tests and hints stay. A line at the
    top says where the copy comes from; on Colab the cell below it fetches the repository. What a
    copy publishes lies apart, as all that is run by hand.
    """
    import nbformat
    from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor

    student = copy.deepcopy(notebook)
    student.metadata.pop("dsvlib", None)
    without = TagRemovePreprocessor(enabled=True, remove_cell_tags={"solution"})
    for step in (without, ClearOutputPreprocessor(enabled=True)):
        student, _ = step(student, {})
    leave_out_sources(student)
    _lead_pictures(student)
    about = nbformat.v4.new_markdown_cell(_header(name), id="student-about")
    student.cells[1:1] = [about]
    if repository := repository_code():
        setup = FETCH.replace("OWNER/NAME", repository)
        student.cells[2:2] = [nbformat.v4.new_code_cell(setup, id="student-setup")]
    return student


def _lead_pictures(notebook: Any) -> None:
    """Have recorded pictures in the text be found from a student copy, in place.

    Colab shows no file beside a notebook, so they come from the repository once it has a name.
    """
    repository = repository_code()
    root = f"https://raw.githubusercontent.com/{repository}/HEAD" if repository else "../.."
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = PICTURE.sub(rf"![\g<words>]({root}/figures/\g<address>.png)", cell.source)


def _header(name: str) -> str:
    badges = " · ".join(f"[{label}]({url})" for label, url in launch_links(name).items())
    return (
        f"> **Student edition**, generated from [{name}](../{name}.ipynb) by `dsv notebooks "
        f"student`: edit that one. Each exercise has a stub to complete and a test below it that "
        f"fails until you have; the solutions are in the original."
        + (f"\n>\n> Run it on {badges}." if badges else "")
    )


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
        notebook = read_notebook(source)
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
