"""What a crafted record says reaches no page as markup: not the wall, the site, nor a notebook."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from checkout import make_checkout, whole_run
from matplotlib.figure import Figure

from companion.ledger.figure_wall import read_runs, write_wall
from companion.runs import Run, digest, figures_root, write_json
from companion.site import content
from companion.site.render import render
from dsvlib._files import file_digest

EVIL = (
    "</p>\n\n<script>alert(1)</script> <img src=x onerror=alert(1)> \"' onload=x {{7*7}} [a](b) `c`"
)


class Seen(HTMLParser):
    """The tags of a page and the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]


def crafted(value: Any) -> Any:
    """Return JSON whose every text is evil, but for what says where files are."""
    if isinstance(value, dict):
        return {key: crafted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [crafted(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose digests are right and whose every word is evil, the sidecar's seed too."""
    make_checkout(tmp_path, monkeypatch)
    with whole_run(figures_root() / "quick" / "01_line"):
        run = Run.start("01_line", preset="quick", seed=0, parameters={"word": EVIL, EVIL: 1})
    fig = Figure(figsize=(2, 1))
    fig.add_subplot().plot([0, 1])
    run.save_figure(fig, "line", alt=EVIL, caption=EVIL)
    run.record("K1", "steps", 5, unit=EVIL)
    run.complete()
    for name in ("line.json", "record.json"):
        kept = {"kind", "files", "schema", "name"}
        kept |= {"preset", "notebook"} if name == "record.json" else set()
        about = json.loads((run.directory / name).read_text())
        about = {k: v if k in kept else crafted(v) for k, v in about.items() if k != "digest"}
        if name == "line.json":
            about["seed"] = EVIL  # a record with such a seed is refused as a whole
        else:
            about["values"] = [v | {"name": "steps"} for v in about["values"]]  # another name too
            about["files"] = {n: file_digest(run.directory / n) for n in about["files"]}
            about |= {"digest": digest(about)}
        write_json(run.directory / name, about)
    return run.directory


def assert_harmless(page: str, tags: set[str]) -> None:
    seen = Seen(page)
    assert set(seen.tags) <= tags
    assert not {name for name in seen.attributes if name.startswith("on") or name == "{{7*7}}"}
    assert "{{7*7}}" in page
    assert "&lt;script&gt;alert(1)" in page, "it is shown as the text that it is"
    assert not [address for address in seen.addresses if ":" in address or "<" in address]


TAGS = {
    *("section", "h1", "h2", "h3", "p", "div", "figure", "a", "img", "figcaption", "span", "dl"),
    *("details", "summary", "dt", "dd", "code", "ul", "li", "table", "thead", "tbody", "tr", "th"),
    *("td", "em", "pre", "html", "meta", "title", "style", "main", "small", "b", "strong"),
}


def test_the_folders_pages_show_it_as_text(directory: Path) -> None:
    own = directory.parents[2] / "build" / "runs" / "quick"
    own.parent.mkdir(parents=True)
    directory.parent.rename(own)
    page = write_wall(own, EVIL).read_text()
    assert_harmless(page, TAGS)
    readme = (own / "README.md").read_text()
    assert_harmless(readme, TAGS)
    html = readme[readme.index("<section>") :]
    assert "\n\n" not in html.strip(), "an empty line would let Markdown read what follows"


def test_the_sites_wall_shows_it_as_text(directory: Path) -> None:
    runs = read_runs(directory.parent, "figures/quick/")
    assert not runs[0].problem
    text = content.wall(runs, {"01_line": EVIL}, up="../")
    assert_harmless(text, TAGS)
    assert "\n\n" not in text
    page = render("scale.md", badge="x", preset="quick", wall=text, ledger="")
    assert "<script" not in page
    assert "<script" not in content.badge(EVIL, EVIL)


def test_a_sidecar_that_names_another_file_is_refused(directory: Path) -> None:
    for name in ('x" onerror="y', "../../record", "javascript:x"):
        about = json.loads((directory / "line.json").read_text()) | {"name": name}
        write_json(directory / "line.json", about)
        record = json.loads((directory / "record.json").read_text())
        del record["digest"]
        record["files"]["line.json"] = file_digest(directory / "line.json")
        write_json(directory / "record.json", record | {"digest": digest(record)})
        (run,) = read_runs(directory.parent)
        assert "expected the name 'line' in it" in run.problem
        text = content.wall([run], {})
        assert "<img" not in text
        assert "onerror" not in text


def test_the_ledger_shows_it_as_text() -> None:
    from test_site_content import Row

    row = Row(EVIL, "partly", *[EVIL] * 9)
    text = content.ledger([row], {EVIL: EVIL}) + content.verdict_summary([row])
    assert_harmless(text, TAGS)


def test_a_notebooks_page_shows_it_as_text() -> None:
    picture = {"image/png": {"alt": EVIL}}
    cell = {"cell_type": "code", "source": "", "metadata": {},
            "outputs": [{"data": {"image/png": ""}, "metadata": picture}]}  # fmt: skip
    head = {"cell_type": "markdown", "source": "# Title", "metadata": {}}
    badge = content.badge(EVIL, EVIL)
    page = content.notebook_page({"cells": [head, cell]}, EVIL, origin=badge, preset=EVIL)
    assert_harmless(page["cells"][0]["source"], TAGS)
    alt = page["cells"][1]["metadata"]["mystnb"]["image"]["alt"]
    assert "\n" not in alt, "MyST-NB escapes it and hands it to HTML as one attribute"
