"""The site: pages of the recorded runs, built by Sphinx into ``build/site/html``, whole or not.

Only complete runs are shown (`read_record` checks them). Nothing is fetched, neither while building
nor by a reader's browser: style, scripts and MathJax lie in ``site/_static``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from companion.blind_test import NAME, BlindTest
from companion.ledger.claims import blind_test_folder, claim_rows
from companion.ledger.figure_wall import PublishedRun, read_runs
from companion.notebooks import (
    launch_links,
    leave_out_sources,
    normalise,
    read_notebook,
    repository_code,
)
from companion.presets import check_preset, notebook_names, plan, read_presets
from companion.runs import BADGES, RECORD, figures_root, read_record, repository_root
from companion.site import content, pictures
from companion.site.render import render
from companion.workflow import up_to_date
from dsvlib._errors import DsvError, explain

# files of docs that are pages here, too
DOCUMENTS = ("findings", "own-classifier", "running", "questions", "teaching")
HERO = "cifar10_from_a_classifier_alone"  # a figure of notebook 14
FILM = "noise_to_photographs"  # its animation, the first to move through
PHOTOGRAPHS = "cifar10"  # the preset whose verdicts come first, where it is recorded


def build_site(preset: str = "quick", *, echo: Callable[[str], object] = print) -> Path:
    """Build the site around the figures of `preset` and return its folder, ``build/site/html``.

    The site that was there stays until the new one is whole. Raises RequestError for an unknown
    preset, DsvError where the preset has no complete run, Sphinx is missing or a page has an error.
    """
    check_preset(preset, read_presets())
    runs = read_runs(figures_root() / preset)
    if all(run.problem for run in runs):
        raise DsvError(
            f"no complete run of preset {preset!r} to show; run dsv reproduce --preset {preset}"
        )
    home = repository_root() / "build" / "site"
    html, work = home / "html", home / f"work-{os.getpid()}"
    with explain("write to", home):
        _remove_leftovers(home)
        try:
            write_sources(preset, work / "source", work / "extra")
            _sphinx(work)
            shutil.rmtree(html, ignore_errors=True)
            os.replace(work / "html", html)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    for run in runs:
        if run.problem:
            echo(run.problem)
    count = sum(1 for _ in html.rglob("*.html"))
    echo(f"{count} pages in {os.path.relpath(html)}; open {os.path.relpath(html / 'index.html')}")
    return html


def _remove_leftovers(home: Path) -> None:
    """Remove what builds that were killed have left; one that runs beside this keeps its own."""
    import psutil  # type: ignore[import-untyped]

    for folder in home.glob("work-*"):
        if not psutil.pid_exists(int(folder.name.removeprefix("work-"))):
            shutil.rmtree(folder, ignore_errors=True)


def write_sources(preset: str, source: Path, extra: Path) -> None:
    """Write the pages' sources, and into `extra` the files that they link to as they are."""
    read: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for name in notebook_names():
        path, where = _notebook_to_show(name, preset)
        committed = repository_root() / "notebooks" / f"{name}.ipynb"
        shown = normalise(read_notebook(path), committed)
        leave_out_sources(shown)
        read[name], origins[name] = json.loads(json.dumps(shown)), where
    titles = {name: content.notebook_title(notebook, name) for name, notebook in read.items()}
    _write(source / "exercises.md", content.exercises_page(read, titles))
    cards = _write_results(preset, source, extra, titles)
    for name, notebook in read.items():
        page = content.notebook_page(
            notebook,
            name,
            origin=origins[name],
            preset=preset,
            links=launch_links(name),
            cards=cards,
        )
        _write(source / "notebooks" / f"{name}.ipynb", json.dumps(page, ensure_ascii=False))
        committed = repository_root() / "notebooks" / f"{name}.ipynb"
        (extra / "notebooks").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(committed, extra / "notebooks" / committed.name)
    for name, text in content.reference().items():
        _write(source / "api" / f"{name}.rst", text)
    _write_blind_test(source, extra)
    _write_documents(preset, source, titles)


def _write_documents(preset: str, source: Path, notebooks: Iterable[str]) -> None:
    pages = {f"docs/{name}.md": f"{name}.md" for name in DOCUMENTS}
    pages |= {(page := f"notebooks/{name}.ipynb"): page for name in notebooks}
    for wall in (source / "wall").glob("*.md"):  # the pages of other presets hold their ledgers
        pages[f"figures/{wall.stem}/README.md"] = f"wall/{wall.name}"
        pages[f"figures/claims/{wall.stem}.md"] = f"wall/{wall.name}"
    pages[f"figures/claims/{preset}.md"] = "claims.md"
    for name in DOCUMENTS:
        text = (repository_root() / "docs" / f"{name}.md").read_text(encoding="utf-8")
        _write(source / f"{name}.md", content.document(text, pages, repository_code()))


def _write_results(
    preset: str, source: Path, extra: Path, titles: dict[str, str]
) -> dict[str, str]:
    """Write the pages of all results and return each picture as HTML for a page in a folder."""
    cards: dict[str, str] = {}
    walls: list[tuple[str, str]] = []
    claims = {preset: claim_rows(preset)}
    own: list[PublishedRun] = []
    moving: dict[str, str] = {}  # by name: photographs stand for the digits of the same figure
    for name in read_presets():
        runs = read_runs(figures_root() / name, f"figures/{name}/")
        # a smoke run is no result: it is shown only where it was asked for by name
        if all(run.problem for run in runs) or (name == "smoke" and preset != "smoke"):
            continue
        small = {}
        for entry in (entry for run in runs for entry in run.figures):
            for file, _ in (*entry.links, (Path(entry.picture).name, "")):
                target = extra / entry.folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(figures_root() / name / target.parent.name / file, target)
            original = extra / entry.picture
            small[entry.picture] = pictures.small(entry, original, extra)
            cards[entry.picture] = content.card(entry, up="../", small=small)
            if shots := pictures.frames(entry, original, extra):
                moving[entry.sidecar["name"]] = content.scrubber(entry, shots)
        if name != preset:
            claims[name] = claim_rows(name)
        page = render(
            "scale.md",
            badge=_label(name),
            preset=name,
            wall=content.wall(runs, titles, up="../", small=small),
            ledger=None if name == preset else content.ledger(claims[name], titles, up="../"),
        )
        _write(source / "wall" / f"{name}.md", page)
        walls.append((name, _label(name)))
        if name == preset:
            own = runs
    first = claims.get(PHOTOGRAPHS, []) if preset not in ("smoke", PHOTOGRAPHS) else []
    # the picture for the top of the site: what people come for, else the first notebook's first
    figures = [entry for run in own for entry in run.figures]
    named = [entry for entry in figures if entry.sidecar["name"] == HERO]
    hero = next(iter(named + figures), None)
    page = render(
        "index.md",
        hero=hero and content.card(hero),
        scrubbers=[moving[name] for name in sorted(moving, key=lambda n: (n != FILM, n))],
        verdicts=content.verdict_summary(claims[preset], first),
        badge=BADGES.get(preset, preset),
        photographs=first and BADGES[PHOTOGRAPHS],
        ours=bool(named),
        walls=walls,
        notebooks=list(titles),
    )
    _write(source / "index.md", page)
    _write(source / "glossary.md", render("glossary.md", words=content.glossary()))
    _write(extra / "glossary.js", content.glossary_script())
    _write(source / "claims.md", render("claims.md", ledger=content.ledger(claims[preset], titles)))
    return cards


def _write_blind_test(source: Path, extra: Path) -> None:
    test = entry = None
    if folder := blind_test_folder():
        test = BlindTest.load(folder)
        address = f"figures/{folder.parent.name}"
        (run,) = (r for r in read_runs(folder.parent, f"{address}/") if r.notebook == folder.name)
        entry = next(entry for entry in run.tables if entry.sidecar["name"] == NAME)
        target = extra / entry.folder
        target.mkdir(parents=True, exist_ok=True)
        for file, _ in (*entry.links, (f"{NAME}.png", "")):
            shutil.copyfile(folder / file, target / file)
        _write(target / f"{NAME}_key.js", content.blind_test_key(test))
    page = content.blind_test_page(test, entry, repository_code())
    _write(source / "blind-test.md", page)


def _notebook_to_show(name: str, preset: str) -> tuple[Path, str]:
    """Return the executed notebook to show and HTML that says at which scale it ran."""
    if preset not in read_presets() or name in read_presets()[preset]["omit"]:
        preset = "quick"
    job = plan(preset, only=[name])[0]
    if up_to_date(job):
        return job.build(".ipynb"), content.badge(preset, _scale(job.directory, preset))
    # what is committed was run at quick
    path = repository_root() / "notebooks" / f"{name}.ipynb"
    return path, content.badge("quick", _scale(figures_root() / "quick" / name, "quick"))


def _label(preset: str) -> str:
    """Return a preset in words: its badge or, where it has none, that of its first run."""
    runs = sorted(record.parent for record in (figures_root() / preset).glob(f"*/{RECORD}"))
    return _scale(runs[0], preset) if runs and preset not in BADGES else BADGES.get(preset, preset)


def _scale(directory: Path, preset: str) -> str:
    """Return the data and scale of a run as its figures say it, or as its preset does."""
    try:
        return str(read_record(directory)["scale"])
    except DsvError:
        return BADGES.get(preset, preset)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _sphinx(work: Path) -> None:
    """Make ``html`` of ``source`` and ``extra``; a warning is an error once all are shown."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"]
    command += ["-c", str(repository_root() / "site"), "-d", str(work / "doctrees")]
    command += ["-D", f"html_extra_path={work / 'extra'}"]
    command += [str(work / "source"), str(work / "html")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for package in ("sphinx", "myst_nb", "furo"):
        if importlib.util.find_spec(package) is None:
            raise DsvError(f"{package} is missing, the site is built with it; run make install")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        for line in lines[-40:]:
            print(line, file=sys.stderr)
        raise DsvError("the site was not built: Sphinx's complaints are above; the old one stays")
