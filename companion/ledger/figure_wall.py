"""What published runs show: their figures, tables and values as a page.

All comes from the records and sidecars alone (`read_run` checks them); nothing runs here. What is
committed has pictures, tables and sidecars only: other files are linked where they lie.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.ledger.results import measured, read_run
from companion.runs import RecordError, is_current, repository_root
from companion.site.render import fragment, render
from dsvlib._errors import explain
from dsvlib._files import atomic_path

PICTURES = ("figure", "animation")  # kinds of sidecar
STRIP = 2.6  # width over height from which a picture takes a row of the wall
KINDS = {
    ".csv": "tidy data (CSV)",
    ".npz": "arrays (NPZ)",
    ".safetensors": "samples (safetensors)",
    ".svg": "vector picture (SVG)",
}


@dataclass(frozen=True)
class Entry:
    """One published figure or table: its sidecar, and whether the present code would make it."""

    folder: str  # the address of its notebook's folder
    sidecar: Mapping[str, Any]
    links: tuple[tuple[str, str], ...]  # the files that are there, each with what it is
    fresh: bool
    wide: bool = False  # a strip, to be shown over the wall's whole width

    @property
    def title(self) -> str:
        """The entry's name in words."""
        return str(self.sidecar["name"]).replace("_", " ").capitalize()

    @property
    def settings(self) -> list[str]:
        """The notebook's parameters but for those that every page tells anyway."""
        given = self.sidecar["parameters"].items()
        return [
            f"{name} = {json.dumps(value, ensure_ascii=False)}"
            for name, value in given
            if name not in {"preset", "seed"}
        ]

    @property
    def picture(self) -> str:
        """The address of the picture."""
        return f"{self.folder}/{self.sidecar['name']}.png"

    @property
    def large(self) -> str:
        """The address of the picture to look at closely."""
        name = f"{self.sidecar['name']}.svg"
        return f"{self.folder}/{name}" if name in dict(self.links) else self.picture


@dataclass(frozen=True)
class PublishedRun:
    """What one notebook published, or the `problem` for which nothing of it is shown."""

    notebook: str
    problem: str = ""
    figures: tuple[Entry, ...] = ()
    tables: tuple[Entry, ...] = ()
    command: str = ""
    executed: str = ""  # the notebook with its outputs, beside a run of one's own
    seed: int = 0
    values: tuple[tuple[str, ...], ...] = ()  # rows of text
    repetitions: tuple[tuple[int, str], ...] = ()  # seed and address


def read_runs(folder: Path, address: str = "") -> list[PublishedRun]:
    """Return the runs below a preset's folder, to which `address` leads from the page."""
    return [
        _read(directory, f"{address}{directory.name}")
        for directory in sorted(path for path in folder.glob("*") if path.is_dir())
    ]


def _read(directory: Path, address: str) -> PublishedRun:
    try:
        record = read_run(directory)
        fresh = is_current(record)
        names = [name for name in sorted(record["files"]) if name.endswith(".json")]
        entries = [_entry(directory, name, address, fresh) for name in names]
    except RecordError as error:
        return PublishedRun(directory.name, problem=str(error))
    executed = directory.with_name(f"{directory.name}.ipynb")
    return PublishedRun(
        directory.name,
        executed=executed.name if executed.is_file() else "",
        figures=tuple(entry for entry in entries if entry.sidecar["kind"] in PICTURES),
        tables=tuple(entry for entry in entries if entry.sidecar["kind"] not in PICTURES),
        command=record["command"],
        seed=record["seed"],
        values=tuple(map(_cells, record["values"])),
        repetitions=tuple(
            (other["seed"], os.path.relpath(repository_root() / other["folder"], directory.parent))
            for other in record.get("repetitions", ())
        ),
    )


def _entry(directory: Path, name: str, address: str, fresh: bool) -> Entry:
    sidecar = json.loads((directory / name).read_text(encoding="utf-8"))
    stem = Path(name).stem
    if sidecar.get("name") != stem:
        raise RecordError(f"{directory.name}/{name}: expected the name {stem!r} in it")
    listed = [*sidecar["files"], *sidecar.get("unpublished", ())]
    links = [
        (file, KINDS[Path(file).suffix])
        for file in listed
        if Path(file).stem == stem and Path(file).suffix in KINDS and (directory / file).is_file()
    ]
    picture = directory / f"{stem}.png"
    wide = sidecar["kind"] in PICTURES and _ratio(picture) > STRIP
    return Entry(address, sidecar, (*links, (name, "sidecar (JSON)")), fresh, wide)


def _ratio(picture: Path) -> float:
    """Return the width over the height that a PNG's header gives."""
    with picture.open("rb") as stream:
        header = stream.read(24)
    return int.from_bytes(header[16:20]) / max(1, int.from_bytes(header[20:24]))


def _cells(value: Mapping[str, Any]) -> tuple[str, ...]:
    paper = "" if value["paper"] is None else f"{value['paper']:.4g}"
    shown = measured(value["value"], value["std"], value["unit"])
    return value["claim"], value["name"], shown, str(value["n"]), paper


def write_wall(folder: Path, report: str = "") -> Path:
    """Write the page of a preset's runs below `folder` and return it.

    What is recorded gets a ``README.md``; one's own runs get an ``index.html`` as well, the page to
    open, with `report` on top: how they compare with what is recorded.
    """
    figures = fragment("wall.html", "folder", read_runs(folder))
    pages = {"README.md": render("folder.md", preset=folder.name, figures=figures)}
    if not folder.is_relative_to(repository_root() / "figures"):
        lines = report.splitlines()
        pages["index.html"] = render(
            "folder.html", preset=folder.name, figures=figures, report=lines
        )
    with explain("write to", folder):
        for name, text in pages.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return folder / list(pages)[-1]
