"""The site's pages as text: the figure wall, the ledger, notebooks, exercises and the reference.

Everything comes from records, sidecars, executed notebooks, docstrings and ``docs``; nothing runs
here and nothing is typed in. `companion.site.build` writes the pages and has Sphinx build them.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

import dsvlib
from companion.blind_test import COLUMNS, UNSURE, BlindTest
from companion.ledger.figure_wall import Entry, PublishedRun
from companion.ledger.prose import PICTURE, plain
from companion.site.render import fragment, render

if TYPE_CHECKING:
    from companion.ledger.claims import ClaimRow

# The reference reads in the order in which data pass through the house.
CHAPTERS = (
    ("data", "Data and classifiers",
     ("support_set", "data.datasets", "classifiers.architectures", "classifiers.files",
      "classifiers.foreign")),
    ("training", "Training", ("classifiers.training",)),
    ("conditions", "The DeepKKT conditions", ("gradients", "conditions", "augmentation", "logits")),
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
    "undecided": ("open", "?"),
    "not reproduced": ("no", "✗"),
    "not attempted": ("none", "○"),
}
GLOSSARY = Path(__file__).with_name("glossary.yml")
# Cells that fetch, draw or record teach little: a page folds them.
MACHINERY = re.compile(r"^(?:import|from) |\brun\.(?:save_|record)|\bfig\b", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")
EXERCISE = re.compile(r"^(?:#+ |\*\*)(Exercise \d+.*?)(?:\*\*|$)", re.MULTILINE)


def badge(preset: str, text: str) -> Markup:
    """Return the badge that says at which scale a number or picture was made."""
    return fragment("wall.html", "badge", preset, text)


def wall(
    runs: Sequence[PublishedRun],
    titles: Mapping[str, str],
    *,
    up: str = "",
    small: Mapping[str, str] | None = None,
) -> Markup:
    """Return all figures as HTML, notebook by notebook; `small` has the addresses of small copies.

    `up` leads from the page to the site's root.
    """
    return fragment("wall.html", "wall", runs, titles, up, small or {})


def card(entry: Entry, *, up: str = "", small: Mapping[str, str] | None = None) -> Markup:
    """Return one figure as HTML, with its finding, caption, badge and panel; see `wall`."""
    return fragment("wall.html", "card", entry, up, small=small or {})


def scrubber(entry: Entry, frames: Sequence[tuple[str, str]]) -> Markup:
    """Return an animation as a picture that a reader moves through, frame by frame."""
    return fragment("wall.html", "scrubber", entry, frames)


def glossary() -> dict[str, str]:
    """Return the words of the glossary with what they mean."""
    return dict(yaml.safe_load(GLOSSARY.read_text(encoding="utf-8")))


def glossary_script() -> str:
    """Return the glossary as a script, which lays hints over words in the text."""
    return f"globalThis.glossary = {json.dumps(glossary(), ensure_ascii=False)};\n"


def verdict_summary(claims: Sequence[ClaimRow], first: Sequence[ClaimRow] = ()) -> Markup:
    """Return the claims of each verdict as HTML, for the landing page.

    The verdict is that of `first` where the claim was attempted there, and what the same claim has
    in `claims` stands behind in brackets if that is another.
    """
    attempted = {claim.id: claim for claim in first if claim.verdict != "not attempted"}
    pairs = [(attempted.get(claim.id, claim), claim) for claim in claims]
    verdicts = [
        (verdict, *kind, [pair for pair in pairs if pair[0].verdict == verdict])
        for verdict, kind in VERDICTS.items()
    ]
    return fragment("ledger.html", "summary", verdicts)


def ledger(claims: Sequence[ClaimRow], titles: Mapping[str, str], *, up: str = "") -> Markup:
    """Return the ledger as HTML: one row per claim, none left out; `up` leads to the root."""
    rows = [(claim, str(claim.verdict), *VERDICTS[claim.verdict]) for claim in claims]
    return fragment("ledger.html", "ledger", rows, titles, up)


# --- the blind test ------------------------------------------------------------------------------


def blind_test_page(test: BlindTest | None, entry: Entry | None, repository: str = "") -> str:
    """Return the page that asks about a recorded set, or says that there is none.

    `repository` is GitHub's ``owner/name``, where answers are sent.
    """
    section = Markup("")
    if test is not None and entry is not None:
        size = test.pictures.shape[2:0:-1]
        values = (test, entry, size, COLUMNS, UNSURE, repository)
        section = fragment("blind_test.html", "section", *values)
    return render("blind_test.md", test=test, section=section)


def blind_test_key(test: BlindTest) -> str:
    """Return the key as a script, which the page reads at the end, also from a reader's disk."""
    rows = test.key.to_dict(orient="records")
    return f"globalThis.blindTestKey = {json.dumps({'set': test.digest, 'key': rows})};\n"


# --- notebooks -----------------------------------------------------------------------------------


def notebook_title(notebook: Mapping[str, Any], name: str) -> str:
    """Return a notebook's first heading."""
    first = notebook["cells"][0]["source"] if notebook["cells"] else ""
    found = re.match(r"#\s+(.+)", first)
    return found[1].strip() if found else name


def notebook_page(
    notebook: dict[str, Any],
    name: str,
    *,
    origin: str,
    preset: str,
    links: Mapping[str, str] | None = None,
    cards: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a notebook as a page: what does not teach folded, pictures with alt text, its scale.

    `origin` is HTML that says where the outputs come from, `preset` has its figures on a wall,
    `links` lead to where it runs in a browser, and `cards` has recorded pictures as HTML by their
    addresses: one that the site does not show is told in its words. The input is changed and
    returned.
    """

    def shown(found: re.Match[str]) -> str:
        return (cards or {}).get(f"figures/{found['address']}.png", f"*{found['words']}*")

    cells = notebook["cells"]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = PICTURE.sub(shown, cell["source"])
        metadata = cell.setdefault("metadata", {})
        tags = metadata.setdefault("tags", [])
        options: dict[str, Any] = {}
        for tag in {"solution", "test"} & set(tags):
            tags.append("hide-input")
            options = {f"code_prompt_{state}": tag.capitalize() for state in ("show", "hide")}
        teaches = {"exercise", "parameters", "hide-input"} & set(tags)
        if cell["cell_type"] == "code" and not teaches and MACHINERY.search(cell["source"]):
            tags.append("hide-input")
        for output in cell.get("outputs", []):
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                options["image"] = {"alt": " ".join(alt.split())}
            # a scoped style per table would only repeat what the site's own style says
            if html := output.get("data", {}).get("text/html"):
                clean = re.sub(r"<style scoped>.*?</style>\n?", "", html, flags=re.DOTALL)
                output["data"]["text/html"] = clean.replace(' border="1"', "")
        if options:
            metadata["mystnb"] = options
    if cells and cells[0]["cell_type"] == "markdown":
        title, _, rest = cells[0]["source"].partition("\n")
        line = fragment("wall.html", "origin", Markup(origin), name, preset, links or {})
        cells[0]["source"] = f"{title}\n\n{line}\n\n{rest.lstrip()}"
    return notebook


def exercises(notebook: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield title, task, stub and solution of each exercise of a notebook."""
    task, stub = "", ""
    for cell in notebook["cells"]:
        tags = cell.get("metadata", {}).get("tags", [])
        if cell["cell_type"] == "markdown":
            task, stub = cell["source"], ""
        elif "exercise" in tags:
            stub = cell["source"]
        elif "solution" in tags and stub:
            for found in list(EXERCISE.finditer(task))[-1:]:
                rest = task[found.end() :].strip()
                yield found[1].rstrip(". "), rest, stub, cell["source"]
            stub = ""


def exercises_page(notebooks: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Return the page of all exercises, with folded hints and solutions."""
    found = [(name, titles[name], list(exercises(n))) for name, n in notebooks.items()]
    return render("exercises.md", notebooks=[entry for entry in found if entry[2]])


# --- documents -----------------------------------------------------------------------------------


def document(text: str, pages: Mapping[str, str], repository: str = "") -> str:
    """Return a file of ``docs`` as a page at the site's root, with links that lead somewhere there.

    `pages` has the address of each page by the file that it shows. Other files are linked to in
    `repository`, GitHub's ``owner/name``; where that is empty, the words stay without a link.
    Comments that name where numbers come from are left out.
    """

    def led(found: re.Match[str]) -> str:
        words, target = found.groups()
        path, *anchor = target.partition("#")
        file = posixpath.normpath(f"docs/{path}")
        if not (address := pages.get(file)):
            if not repository:
                return words
            address = f"https://github.com/{repository}/blob/HEAD/{file}"
        return f"[{words}]({address}{''.join(anchor)})"

    return LINK.sub(led, plain(text))


# --- the reference -------------------------------------------------------------------------------


def reference() -> dict[str, str]:
    """Return the pages of the API reference as reStructuredText, by name, `index` first."""
    named = {module for _, _, modules in CHAPTERS for module in modules}
    homes = public_names()
    rest = tuple(module for module in homes if module not in named)
    chapters = [*CHAPTERS, (*REST, rest)] if rest else list(CHAPTERS)
    pages = {"index": render("reference_index.rst", names=[name for name, _, _ in chapters])}
    for name, title, modules in chapters:
        shown = [(m, [_entry(public) for public in homes[m]]) for m in modules if m in homes]
        pages[name] = render("reference.rst", title=title, modules=shown)
    return pages


def public_names() -> dict[str, list[str]]:
    """Return the public names of dsvlib by the module that defines them, as its stub lists them."""
    stub = Path(dsvlib.__file__).with_suffix(".pyi")
    homes: dict[str, list[str]] = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            homes.setdefault(str(node.module), []).extend(alias.name for alias in node.names)
    return homes


def _entry(name: str) -> tuple[str, str, str]:
    """Return a public name's directive, the name, and the text where it has no docstring."""
    value = getattr(dsvlib, name)
    if isinstance(value, type):
        return "autoclass", name, ""
    if callable(value):
        return "autofunction", name, ""
    # a constant has no docstring of its own: autodoc would show that of its type
    return "py:data", name, f"`{value!r}`"


def plain_docstring(lines: Sequence[str]) -> list[str]:
    """Return a docstring's lines with what reStructuredText would misread taken as it is written.

    Docstrings here are prose with `code`, definition lists and equations in plain text; napoleon
    and numpydoc take what follows a list of parameters for more of them. An indented block after an
    empty line is kept as it is laid out; elsewhere ``*`` and ``|`` mean themselves.
    """
    found: list[str] = []
    block, above = False, 0  # whether this is a block, and how far what it hangs below is indented
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if set(line.strip()) == {"-"} and number and lines[number - 1].strip():
            found[-1:] = [f"**{lines[number - 1].strip()}**", ""]  # a heading in numpydoc's way
            continue
        if line.strip():
            if block and indent <= above:
                block = False
            elif not block and number and not lines[number - 1].strip() and indent > above:
                block = True
                found += [" " * above + "::", ""]
            if not block:
                above = indent
                pieces = re.split(r"(``.+?``|`[^`]+`)", line)
                pieces[::2] = [re.sub(r"([*|])", r"\\\1", piece) for piece in pieces[::2]]
                line = "".join(pieces)
        found.append(line)
    return found
