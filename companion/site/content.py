"""The site's pages as text: the figure wall, the ledger, notebooks, exercises and the reference.

Everything comes from records, sidecars, executed notebooks and docstrings; nothing runs here and
nothing is typed in. `companion.site.build` writes the pages and has Sphinx build them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

import dsvlib
from companion.runs import RecordError, figures_root, is_current, read_record

# The reference reads in the order in which data pass through the house.
CHAPTERS = (
    ("data", "Data and classifiers",
     ("support_set", "data.datasets", "classifiers.architectures", "classifiers.files",
      "classifiers.foreign")),
    ("training", "Training", ("classifiers.training",)),
    ("conditions", "The DeepKKT conditions", ("conditions", "priors", "augmentation", "logits")),
    ("making", "Making and finding support vectors",
     ("solution", "synthesis", "multipliers", "selection", "distillation")),
    ("judging", "Judging them", ("evaluation",)),
    ("analysis", "Analysis", ("analysis.lambda_accuracy", "analysis.spectrum")),
)  # fmt: skip
REST = ("more", "More")  # a module that no chapter names yet is shown here, never left out

# A verdict is told by its word and its symbol; the colour only repeats them.
VERDICTS = {
    "reproduced": ("yes", "✓"),
    "partly": ("partly", "◐"),
    "not reproduced": ("no", "✗"),
    "not attempted": ("none", "○"),
}
STRIP = 2.6  # width over height from which a picture takes a row of the wall
EXERCISE = re.compile(r"^(?:#+ |\*\*)(Exercise \d+.*?)(?:\*\*|$)", re.MULTILINE)
DATA = {".csv": "tidy data (CSV)", ".npz": "arrays (NPZ)", ".svg": "vector picture (SVG)"}


@dataclass(frozen=True)
class Figure:
    """One published figure: its sidecar, and whether the present code would make it again."""

    folder: str  # figures/<preset>/<notebook>
    sidecar: Mapping[str, Any]
    fresh: bool
    wide: bool = False  # a strip, to be shown over the wall's whole width

    @property
    def title(self) -> str:
        """The figure's name in words."""
        return str(self.sidecar["name"]).replace("_", " ").capitalize()

    @property
    def picture(self) -> str:
        """The address of the picture from the site's root."""
        return f"{self.folder}/{self.sidecar['name']}.png"


class Claim(Protocol):
    """What a page needs to know of one line of the ledger."""

    @property
    def id(self) -> str:
        """The claim's name, such as DSV-F1."""

    @property
    def where(self) -> str:
        """The paper and its figure or table."""

    @property
    def statement(self) -> str:
        """The claim in our words."""

    @property
    def verdict(self) -> str:
        """One of VERDICTS."""

    @property
    def scale(self) -> str:
        """The badge of the run."""

    @property
    def preset(self) -> str:
        """The preset of the run."""

    @property
    def measured(self) -> str:
        """Our numbers."""

    @property
    def paper(self) -> str:
        """The paper's number."""

    @property
    def tolerance(self) -> str:
        """What counts as reproduced."""

    @property
    def notebook(self) -> str:
        """The notebook that tests it."""

    @property
    def reason(self) -> str:
        """Why the verdict is what it is."""


def read_figures(preset: str) -> dict[str, list[Figure] | RecordError]:
    """Return the figures of each notebook of a preset, or what is wrong with its run."""
    found: dict[str, list[Figure] | RecordError] = {}
    for directory in sorted(p for p in (figures_root() / preset).glob("*") if p.is_dir()):
        try:
            record = read_record(directory)
        except RecordError as error:
            found[directory.name] = error
            continue
        fresh = is_current(record)
        names = [name for name in sorted(record["files"]) if name.endswith(".json")]
        sidecars = [json.loads((directory / name).read_text(encoding="utf-8")) for name in names]
        found[directory.name] = [
            Figure(
                f"figures/{preset}/{directory.name}",
                sidecar,
                fresh,
                _ratio(directory / f"{sidecar['name']}.png") > STRIP,
            )
            for sidecar in sidecars
            if sidecar["kind"] == "figure"
        ]
    return found


def _ratio(picture: Path) -> float:
    """Return the width over the height that a PNG's header gives."""
    with picture.open("rb") as stream:
        header = stream.read(24)
    return int.from_bytes(header[16:20]) / max(1, int.from_bytes(header[20:24]))


def badge(preset: str, text: str) -> str:
    """Return the badge that says at which scale a number or picture was made."""
    return f'<span class="badge badge-{escape(preset)}">{escape(text)}</span>'


def wall(
    figures: Mapping[str, list[Figure] | RecordError],
    titles: Mapping[str, str],
    *,
    up: str = "",
    shown: Figure | None = None,
) -> str:
    """Return all figures as HTML, notebook by notebook, but for one `shown` already.

    `up` leads from the page to the site's root.
    """
    parts = []
    for notebook, content in figures.items():
        title = escape(titles.get(notebook, notebook))
        link = f'<a href="{up}notebooks/{notebook}.html">{title}</a>'
        parts.append(f'<section class="room" id="wall-{notebook}">')
        parts.append(f"<h3>{link if notebook in titles else title}</h3>")
        if isinstance(content, RecordError):
            parts.append(f'<p class="broken">No complete run: {escape(str(content))}.</p>')
        else:
            parts.append('<div class="wall">')
            parts += [card(figure, up=up) for figure in content if figure != shown]
            parts.append("</div>")
        parts.append("</section>")
    return "\n".join(parts)  # without an empty line, which would end a block of HTML in Markdown


def card(figure: Figure, *, up: str = "") -> str:
    """Return one figure with its finding, caption, badge and panel, as one line of HTML."""
    about = figure.sidecar
    picture, finding = escape(up + figure.picture), escape(_one_line(about["alt"]))
    large = escape(f"{up}{figure.folder}/{about['name']}.svg")
    caption = escape(_one_line(about["caption"]))
    # The finding is the image's alternative text; to read it out twice would help no one.
    return (
        f'<figure class="card{" wide" * figure.wide}"><a class="picture" href="{large}">'
        f'<img src="{picture}" alt="{finding}" loading="lazy" decoding="async"></a><figcaption>'
        f'<p class="card-title">{escape(figure.title)} {badge(about["preset"], about["scale"])}</p>'
        f'<p class="finding" aria-hidden="true">{finding}</p>'
        f'<p class="card-caption">{caption}</p>{why_panel(figure, up=up)}</figcaption></figure>'
    )


def why_panel(figure: Figure, *, up: str = "") -> str:
    """Return the panel that says how a figure was made, folded, as one line of HTML."""
    about = figure.sidecar
    given = {k: v for k, v in about["parameters"].items() if k not in {"preset", "seed"}}
    settings = "".join(
        f"<li><code>{escape(k)} = {escape(json.dumps(v, ensure_ascii=False))}</code></li>"
        for k, v in given.items()
    )
    files = [
        f'<a href="{escape(f"{up}{figure.folder}/{name}")}">{DATA[Path(name).suffix]}</a>'
        for name in about["files"]
        if Path(name).suffix in DATA
    ]
    files.append(f'<a href="{escape(up + figure.folder)}/{about["name"]}.json">sidecar (JSON)</a>')
    state = {True: ", with changes not committed", None: ", no git"}.get(about["dirty"], "")
    code = "of this checkout" if figure.fresh else "older or newer than this checkout"
    environment = about["environment"]
    machine = (
        f"{environment['device']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, Python {environment['python']}, {environment['platform']}"
    )
    rows = {
        "Command": f'<code class="command">{escape(about["command"])}</code>',
        "Parameters": f'<ul class="settings">{settings}</ul>' if settings else "none",
        "Seed": f"<code>{about['seed']}</code>",
        "Commit": f"{_short(about['commit'])}{escape(state)}",
        "Code": f"{_short(about['code'])}, {code}",
        "Data digest": _short(about["data_digest"]) if about["data_digest"] else "no data set",
        "Machine": escape(machine),
        "Files": " · ".join(files),
    }
    entries = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
    return f'<details class="why"><summary>How it was made</summary><dl>{entries}</dl></details>'


def _short(digest: str) -> str:
    return f'<code title="{escape(digest)}">{escape(digest[:12])}</code>'


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- the ledger ----------------------------------------------------------------------------------


def chip(verdict: str) -> str:
    """Return a verdict as word, symbol and colour."""
    kind, symbol = VERDICTS[verdict]
    return (
        f'<span class="verdict verdict-{kind}"><b aria-hidden="true">{symbol}</b> {verdict}</span>'
    )


def verdict_summary(claims: Sequence[Claim]) -> str:
    """Return the claims of each verdict as HTML, for the landing page."""
    parts = ['<div class="verdicts">']
    for verdict in VERDICTS:
        hits = [claim for claim in claims if _verdict_of(claim) == verdict]
        names = " ".join(
            f'<a href="claims.html#{escape(c.id.lower())}" title="{escape(c.statement)}">'
            f"{escape(c.id)}</a>"
            for c in hits
        )
        parts.append(
            f"<div><p>{chip(verdict)} <strong>{len(hits)}</strong></p><p>{names}</p></div>"
        )
    return "\n".join([*parts, "</div>"])


def ledger(claims: Sequence[Claim], titles: Mapping[str, str], *, up: str = "") -> str:
    """Return the ledger as HTML: one row per claim, none left out; `up` leads to the root."""
    head = ("Claim", "Verdict", "Measured", "Paper", "Counts as reproduced")
    parts = ['<table class="ledger"><thead><tr>']
    parts += [f'<th scope="col">{name}</th>' for name in head]
    parts.append("</tr></thead><tbody>")
    for claim in claims:
        name = claim.notebook
        link = f'<a href="{up}notebooks/{name}.html">notebook {escape(name[:2])}</a>'
        run = [link] if name in titles else []
        run += [badge(claim.preset, claim.scale)] if claim.scale else []
        verdict = _verdict_of(claim)
        cells = (
            f'{chip(verdict)}<p class="reason">{escape(claim.reason)}</p>',
            "".join(f"<p>{_unbroken(part)}</p>" for part in claim.measured.split("; "))
            + f"<p>{' '.join(run)}</p>",
            escape(claim.paper or "–"),
            escape(claim.tolerance or "–"),
        )
        kind = VERDICTS[verdict][0]
        parts.append(f'<tr id="{escape(claim.id.lower())}" class="row-{kind}"><th scope="row">')
        parts.append(
            f"<code>{escape(claim.id)}</code> <small>{escape(claim.where)}</small>"
            f"<p>{escape(claim.statement)}</p></th>"
        )
        parts += [
            f'<td data-label="{name}"><div>{cell}</div></td>'
            for name, cell in zip(head[1:], cells, strict=True)
        ]
        parts.append("</tr>")
    return "\n".join([*parts, "</tbody></table>"])


def _unbroken(text: str) -> str:
    """Return text in which ``n = 3`` stays on one line."""
    return escape(text).replace("n = ", "n&nbsp;=&nbsp;")


def _verdict_of(claim: Claim) -> str:
    """Return the verdict in words; one that is not known counts as not attempted, hence red."""
    return str(claim.verdict) if str(claim.verdict) in VERDICTS else "not attempted"


# --- notebooks -----------------------------------------------------------------------------------


def source_of(cell: Mapping[str, Any]) -> str:
    """Return a cell's text, which the format keeps as one string or as lines."""
    return "".join(cell["source"])


def notebook_title(notebook: Mapping[str, Any], name: str) -> str:
    """Return a notebook's first heading."""
    first = source_of(notebook["cells"][0]) if notebook["cells"] else ""
    found = re.match(r"#\s+(.+)", first)
    return found[1].strip() if found else name


def notebook_page(notebook: dict[str, Any], name: str, *, origin: str) -> dict[str, Any]:
    """Return a notebook as a page: solutions folded, pictures with alt text, its scale on top.

    `origin` is HTML that says where the outputs come from. The input is changed and returned.
    """
    cells = notebook["cells"]
    for cell in cells:
        metadata = cell.setdefault("metadata", {})
        tags = metadata.setdefault("tags", [])
        if cell["cell_type"] != "code":
            continue
        options: dict[str, Any] = {}
        if "solution" in tags:
            tags.append("hide-input")
            options = {"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
        elif "test" in tags:
            tags.append("hide-input")
            options = {"code_prompt_show": "Test", "code_prompt_hide": "Test"}
        for output in cell.get("outputs", []):
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                options["image"] = {"alt": _one_line(alt)}
            # a scoped style per table would only repeat what the site's own style says
            if html := output.get("data", {}).get("text/html"):
                clean = re.sub(r"<style scoped>.*?</style>\n?", "", "".join(html), flags=re.DOTALL)
                output["data"]["text/html"] = clean.replace(' border="1"', "")
        if options:
            metadata["mystnb"] = options
    if cells and cells[0]["cell_type"] == "markdown":
        title, _, rest = source_of(cells[0]).partition("\n")
        line = (
            f'<p class="origin">{origin} · <a href="{name}.ipynb">notebook file</a> · '
            f'<a href="../index.html#wall-{name}">its figures on the wall</a></p>'
        )
        cells[0]["source"] = f"{title}\n\n{line}\n\n{rest.lstrip()}"
    return notebook


def exercises(notebook: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield title, task, stub and solution of each exercise of a notebook."""
    task, stub = "", ""
    for cell in notebook["cells"]:
        tags = cell.get("metadata", {}).get("tags", [])
        text = source_of(cell)
        if cell["cell_type"] == "markdown":
            task, stub = text, ""
        elif "exercise" in tags:
            stub = text
        elif "solution" in tags and stub and (found := _last(EXERCISE.finditer(task))):
            rest = task[found.end() :].strip()
            yield found[1].rstrip(". "), rest, stub, text
            stub = ""


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    last = None
    for last in matches:  # noqa: B007
        pass
    return last


def exercises_page(notebooks: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Return the page of all exercises, with folded hints and solutions."""
    parts = [
        "# Exercises",
        "Short tasks with a test each, from the notebooks. They need what the cells above them "
        "have made, so try them there: open the notebook, write into the cell marked "
        "`# your code`, and run the test below it. Hints and solutions are folded.",
    ]
    for name, notebook in notebooks.items():
        found = list(exercises(notebook))
        if not found:
            continue
        parts.append(f"## [{titles[name]}](notebooks/{name}.ipynb)")
        for title, task, stub, solution in found:
            parts += [f"### {title}", task, f"```python\n{stub}\n```"]
            parts.append('<details class="solution"><summary>Solution</summary>')
            parts += [f"```python\n{solution}\n```", "</details>"]
    return "\n\n".join(parts) + "\n"


# --- the reference -------------------------------------------------------------------------------


def reference() -> dict[str, str]:
    """Return the pages of the API reference as reStructuredText, by name, `index` first."""
    named = {module for _, _, modules in CHAPTERS for module in modules}
    homes = public_names()
    rest = tuple(module for module in homes if module not in named)
    chapters = [*CHAPTERS, (*REST, rest)] if rest else list(CHAPTERS)
    toc = "\n".join(f"   {name}" for name, _, _ in chapters)
    pages = {
        "index": f"{_heading('Reference', '=')}\n"
        "Everything that ``import dsvlib`` offers, in the order in which data pass through: "
        "data and classifiers, the conditions, samples that meet them, and how to judge those.\n\n"
        f".. toctree::\n   :maxdepth: 2\n\n{toc}\n"
    }
    for name, title, modules in chapters:
        parts = [_heading(title, "=")]
        for module in modules:
            if module not in homes:
                continue
            parts += [_heading(f"dsvlib.{module}", "-"), f".. automodule:: dsvlib.{module}\n"]
            parts += [_entry(f"dsvlib.{module}", public) for public in homes[module]]
        pages[name] = "\n".join(parts)
    return pages


def public_names() -> dict[str, list[str]]:
    """Return the public names of dsvlib by the module that defines them, as its stub lists them."""
    stub = Path(dsvlib.__file__).with_suffix(".pyi")
    homes: dict[str, list[str]] = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            homes.setdefault(str(node.module), []).extend(alias.name for alias in node.names)
    return homes


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def _entry(module: str, name: str) -> str:
    value = getattr(dsvlib, name)
    if isinstance(value, type):
        return f".. autoclass:: {module}.{name}\n   :members:\n"
    if callable(value):
        return f".. autofunction:: {module}.{name}\n"
    # A constant has no docstring of its own: autodoc would show that of its type.
    text = (
        f"Keys: {', '.join(f'`{k}`' for k in value)}."
        if isinstance(value, dict)
        else f"`{value!r}`"
    )
    return f".. py:data:: {module}.{name}\n\n   {text}\n"


def plain_docstring(lines: Sequence[str]) -> list[str]:
    """Return a docstring's lines with what reStructuredText would misread taken as it is written.

    Docstrings here are prose with `code`, definition lists and equations in plain text. An indented
    block after an empty line is kept as it is laid out; elsewhere ``*`` and ``|`` mean themselves.
    """
    found: list[str] = []
    block = -1  # the indentation of the text that a block hangs below, -1 outside one
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            found.append(line)
            continue
        if set(line.strip()) == {"-"} and number and lines[number - 1].strip():
            found[-1:] = [f"**{lines[number - 1].strip()}**", ""]  # a heading in numpydoc's way
            continue
        before = next((other for other in reversed(lines[:number]) if other.strip()), "")
        above = len(before) - len(before.lstrip())
        if block >= 0 and indent <= block:
            block = -1
        if block < 0 and number and not lines[number - 1].strip() and before and indent > above:
            block = above
            found += [" " * above + "::", ""]
        found.append(line if block >= 0 else _escape_markup(line))
    return found


def _escape_markup(line: str) -> str:
    pieces = re.split(r"(``.+?``|`[^`]+`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([*|])", r"\\\1", p) for p in pieces)


def fill(text: str, parts: Mapping[str, str | Iterable[str]]) -> str:
    """Return `text` with each ``<!-- name -->`` replaced by its part.

    Raises ValueError for a marker that is missing or unknown, so that nothing silently vanishes.
    """
    for name, part in parts.items():
        marker = f"<!-- {name} -->"
        if text.count(marker) != 1:
            raise ValueError(f"expected {marker} once in the page, got {text.count(marker)}")
        text = text.replace(marker, part if isinstance(part, str) else "\n".join(part))
    if found := re.search(r"<!-- (\w+) -->", text):
        raise ValueError(f"no part for the marker {found[0]}; expected one of {', '.join(parts)}")
    return text
