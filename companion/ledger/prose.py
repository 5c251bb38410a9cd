"""Numbers and pictures of ours in running text, which come from what is recorded.

Such a number, in README, docs and notebooks, is followed by a comment that neither GitHub nor
Jupyter shows. It names the value:
``88.8<!-- quick EXT-FLIP auroc_own_term_at_30 :.1f -->`` is what ``data/results/quick.csv`` has
under that claim and quantity, in that format; ``name.low``, ``name.high`` and ``name.std`` are the
ends of its interval and its deviation. ``12<!-- cifar10 03 minutes :.0f -->`` is what notebook 03
is known to take, ``all`` what those of the preset take together. `write_numbers` fills all numbers
anew, as `dsv record` does at its end; the site and student editions leave out the comments
(`plain`). A picture ``![words](../figures/quick/01_x/y.png)`` is a recorded figure, and the words
are its own.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from companion.forecast import expected
from companion.presets import plan, read_presets
from companion.runs import figures_root, repository_root
from dsvlib._errors import DsvError, explain
from dsvlib._files import atomic_path

COMMENT = re.compile(r"(?P<shown>[+−-]?\d+(?:,\d{3})*(?:\.\d+)?)?<!--(?P<inside>.*?)-->", re.DOTALL)
SOURCE = re.compile(
    r" (?P<preset>\S+) (?P<claim>\S+) (?P<name>[^\s.]+)(?:\.(?P<part>low|high|std))? "
    r":(?P<format>\S+) "
)
# a recorded figure, seen from a folder beside figures/; its address lacks the ending
PICTURE = re.compile(r"!\[(?P<words>(?:\\.|[^\]\\])*)\]\(\.\./figures/(?P<address>[^)\s]+)\.png\)")
Recorded = Mapping[tuple[str, str, str], Mapping[str, str]]  # rows by preset, claim and quantity


def plain(text: str) -> str:
    """Return a text without the comments that name where its numbers come from."""
    return COMMENT.sub(
        lambda found: (found["shown"] or "") if SOURCE.fullmatch(found["inside"]) else found[0],
        text,
    )


def recorded() -> Recorded:
    """Return the rows of all committed results, and what the notebooks take."""
    rows = _times()
    for path in sorted((repository_root() / "data" / "results").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                rows[path.stem, row["claim"], row["quantity"]] = row
    return rows


def _times() -> dict[tuple[str, str, str], dict[str, str]]:
    """Return the minutes of each notebook, and of all of a preset where all are known.

    They are what the forecast goes by on any machine: the recorded run, else ``expected_s``.
    """
    rows = {}
    for preset in read_presets():
        seconds: dict[str, float | None] = {}
        for job in plan(preset):
            forecast = expected(job, own=False)
            if job.repetition is None:
                seconds[job.notebook[:2]] = None if forecast.bound else forecast.seconds
        known = {number: took for number, took in seconds.items() if took is not None}
        if len(known) == len(seconds):
            known["all"] = sum(known.values())
        for number, took in known.items():
            rows[preset, number, "minutes"] = {"value": str(took / 60)}
    return rows


def fill(text: str, rows: Recorded) -> tuple[str, list[str]]:
    """Return a text with the recorded number before each comment, and what is wrong in it.

    A number whose source is not recorded, or cannot be read, stays as it is and is one sentence.
    """
    problems: list[str] = []

    def number(found: re.Match[str]) -> str:
        try:
            made = _number(found["inside"], rows)
            if found["shown"] is None:
                raise DsvError("expected a number right before it, got none")
        except DsvError as error:
            problems.append(f"<!--{found['inside']}-->: {error}")
            return found[0]
        return f"{made}<!--{found['inside']}-->"

    return COMMENT.sub(number, text), problems


def describe(text: str) -> tuple[str, list[str]]:
    """Return a text whose pictures have their figures' words, and what is wrong in it.

    A picture that is not recorded stays as it is and is one sentence.
    """
    problems: list[str] = []

    def picture(found: re.Match[str]) -> str:
        path = figures_root() / f"{found['address']}.json"
        if not (path.is_file() and path.with_suffix(".png").is_file()):
            problems.append(f"figures/{found['address']}.png is not recorded; correct its name")
            return found[0]
        words = " ".join(json.loads(path.read_text(encoding="utf-8"))["alt"].split())
        escaped = re.sub(r"([\\\[\]*`$<])", r"\\\1", words)
        return f"![{escaped}](../figures/{found['address']}.png)"

    return PICTURE.sub(picture, text), problems


def _number(inside: str, rows: Recorded) -> str:
    source = SOURCE.fullmatch(inside)
    if source is None:
        raise DsvError("expected <!-- PRESET CLAIM QUANTITY :FORMAT --> in one line")
    key = source["preset"], source["claim"], source["name"]
    cell = rows.get(key, {}).get(source["part"] or "value")
    if not cell:
        raise DsvError("no record holds it; correct its name, or say the sentence without a number")
    try:
        return format(float(cell), source["format"]).replace("-", "−")
    except ValueError as error:
        raise DsvError(f"expected a format such as :.1f, got :{source['format']}") from error


def _texts(path: Path) -> tuple[Any, list[tuple[Any, str]]]:
    """Return what a file holds, and of that each holder of a text with the text."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        holder = {"source": content}
        return holder, [(holder, content)]
    notebook = json.loads(content)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return notebook, [(cell, "".join(cell["source"])) for cell in cells]


def pages() -> list[Path]:
    """Return the files that are filled: README, docs and the notebooks."""
    root = repository_root()
    found = [root / "README.md", *(root / "docs").glob("*.md"), root / "notebooks" / "README.md"]
    found += (root / "notebooks").glob("[0-9][0-9]_*.ipynb")
    return sorted(path for path in found if path.is_file())


def _filled() -> Iterator[tuple[Path, Any, list[tuple[Any, str, str]], list[str]]]:
    """Yield each page with what it holds, what changes in it (from, to), and what is wrong."""
    rows = recorded()
    for path in pages():
        content, texts = _texts(path)
        changed, problems = [], []
        for holder, text in texts:
            made, wrong = fill(text, rows)
            problems += wrong
            made, wrong = describe(made)
            problems += wrong
            if made != text:
                changed.append((holder, text, made))
        yield path, content, changed, problems


def outdated() -> list[str]:
    """Return one sentence for each number or picture in a page that is not as recorded."""
    found = []
    for path, _, changed, problems in _filled():
        where = path.relative_to(repository_root())
        found += [f"{where}: {problem}" for problem in problems]
        for _, before, after in changed:
            pairs = zip(COMMENT.finditer(before), COMMENT.finditer(after), strict=True)
            found += [
                f"{where}: expected {new['shown']} before <!--{new['inside']}-->, got {seen}"
                for old, new in pairs
                if (seen := old["shown"]) != new["shown"]
            ]
            pairs = zip(PICTURE.finditer(before), PICTURE.finditer(after), strict=True)
            found += [
                f"{where}: expected {new[0]}, got other words"
                for old, new in pairs
                if old["words"] != new["words"]
            ]
    return found


def write_numbers() -> list[Path]:
    """Fill numbers and pictures' words of all pages anew and return the files that changed.

    Raises DsvError, once all others are filled, for a number or picture that is not recorded.
    """
    written, wrong = [], []
    for path, content, changed, problems in _filled():
        where = path.relative_to(repository_root())
        wrong += [f"{where}: {problem}" for problem in problems]
        if not changed:
            continue
        for holder, _, after in changed:
            kept = isinstance(holder["source"], list)
            holder["source"] = after.splitlines(keepends=True) if kept else after
        text = content["source"] if path.suffix == ".md" else _as_json(content)
        with explain("write to", path), atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(path)
    if wrong:
        raise DsvError("\n".join(wrong))
    return written


def _as_json(notebook: Any) -> str:
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
