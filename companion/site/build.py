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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from companion.ledger.claims import claim_rows
from companion.notebooks import normalise
from companion.presets import notebook_names, plan, read_presets
from companion.runs import BADGES, RecordError, figures_root, repository_root
from companion.site import content
from companion.workflow import up_to_date
from dsvlib._errors import DsvError, RequestError, explain


def build_site(preset: str = "quick", *, echo: Callable[[str], object] = print) -> Path:
    """Build the site around the figures of `preset` and return its folder, ``build/site/html``.

    The site that was there stays until the new one is whole. Raises RequestError for an unknown
    preset, DsvError where the preset has no complete run, Sphinx is missing or a page has an error.
    """
    presets = read_presets()
    if preset not in presets:
        raise RequestError.unknown("preset", preset, presets)
    figures = content.read_figures(preset)
    if not any(isinstance(content, list) for content in figures.values()):
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
    broken = [str(content) for content in figures.values() if isinstance(content, RecordError)]
    for problem in broken:
        echo(problem)
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
        read[name], origins[name] = _read_notebook(path, name), where
    titles = {name: content.notebook_title(notebook, name) for name, notebook in read.items()}
    _write(source / "exercises.md", content.exercises_page(read, titles))
    for name, notebook in read.items():
        page = content.notebook_page(notebook, name, origin=origins[name])
        _write(source / "notebooks" / f"{name}.ipynb", json.dumps(page, ensure_ascii=False))
        committed = repository_root() / "notebooks" / f"{name}.ipynb"
        (extra / "notebooks").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(committed, extra / "notebooks" / committed.name)
    for name, text in content.reference().items():
        _write(source / "api" / f"{name}.rst", text)
    _write_results(preset, source, extra, titles)


def _write_results(preset: str, source: Path, extra: Path, titles: dict[str, str]) -> None:
    others = []
    for name in read_presets():
        figures = content.read_figures(name)
        shown = {k: v for k, v in figures.items() if isinstance(v, list)}
        # a smoke run is no result: it is shown only where it was asked for by name
        if not shown or (name == "smoke" and preset != "smoke"):
            continue
        for notebook in shown:
            folder = figures_root() / name / notebook
            shutil.copytree(folder, extra / "figures" / name / notebook)
        if name == preset:
            own = figures
        else:
            others.append(f"Figures: {name} <wall/{name}>")
            _write(source / "wall" / f"{name}.md", _wall_page(name, figures, titles))
    claims, hero = claim_rows(preset), _first_figure(own)
    template = (repository_root() / "site" / "index.md").read_text(encoding="utf-8")
    parts = {
        "hero": f'<div class="hero">{content.card(hero)}</div>' if hero else "",
        "verdicts": content.verdict_summary(claims),
        "wall": content.wall(own, titles, shown=hero),
        "walls": others,
        "notebooks": [f"notebooks/{name}" for name in titles],
    }
    _write(source / "index.md", content.fill(template, parts))
    template = (repository_root() / "site" / "claims.md").read_text(encoding="utf-8")
    _write(source / "claims.md", content.fill(template, {"ledger": content.ledger(claims, titles)}))


def _wall_page(
    preset: str, figures: Mapping[str, list[content.Figure] | RecordError], titles: dict[str, str]
) -> str:
    """Return the page of another scale: its wall, and below it the ledger as it stands there."""
    return "\n\n".join(
        [
            f"---\nhide-toc: true\n---\n\n# Figures: {BADGES.get(preset, preset)}",
            f'<p class="lead">Made by <code>dsv reproduce --preset {preset}</code>.</p>',
            content.wall(figures, titles, up="../"),
            "## The ledger at this scale",
            content.ledger(claim_rows(preset), titles, up="../"),
            "",
        ]
    )


def _first_figure(
    figures: Mapping[str, list[content.Figure] | RecordError],
) -> content.Figure | None:
    """Return the picture for the top of the site: the first notebook's first."""
    lists = [content for content in figures.values() if isinstance(content, list)]
    return next((figure for content in lists for figure in content), None)


def _notebook_to_show(name: str, preset: str) -> tuple[Path, str]:
    """Return the executed notebook to show and HTML that says at which scale it ran."""
    if preset not in read_presets() or name in read_presets()[preset]["omit"]:
        preset = "quick"
    job = plan(preset, only=[name])[0]
    if up_to_date(job):
        return job.build(".ipynb"), content.badge(preset, BADGES.get(preset, preset))
    # what is committed was run at quick
    return repository_root() / "notebooks" / f"{name}.ipynb", content.badge(
        "quick", BADGES["quick"]
    )


def _read_notebook(path: Path, name: str) -> dict[str, Any]:
    import nbformat

    try:
        content = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise DsvError(f"{path.name}: expected a Jupyter notebook, got {error}") from error
    source = repository_root() / "notebooks" / f"{name}.ipynb"
    return dict(json.loads(json.dumps(normalise(content, source))))


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
