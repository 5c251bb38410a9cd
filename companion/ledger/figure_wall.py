"""What recorded runs say: a summary for the terminal, a wall of figures, the README's tables.

All are made from the records and sidecars alone (`read_run` checks them); nothing runs here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from companion.ledger.results import measured, read_run
from companion.runs import RecordError, figures_root, repository_root
from dsvlib._files import atomic_path


def _measured(value: Mapping[str, Any]) -> str:
    return measured(value["value"], value["std"], value["unit"])


def summary(directories: Iterable[Path]) -> str:
    """Return the values recorded by whole runs, one line each."""
    rows = []
    for directory in directories:
        with suppress(RecordError):
            for value in read_run(directory)["values"]:
                paper = "" if value["paper"] is None else f"paper {value['paper']:.4g}"
                rows.append((value["claim"], value["name"], _measured(value), paper))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def write_wall(folder: Path) -> Path:
    """Write the README.md of a preset's folder: a wall of its figures, from the sidecars alone."""
    preset = folder.name
    parts = [f"# Figures: {preset}", "", f"Made by `dsv reproduce --preset {preset}`.", ""]
    for directory in sorted(p for p in folder.glob("*") if p.is_dir()):
        parts += [f"## {directory.name}", ""]
        try:
            record = read_run(directory)
        except RecordError as error:
            parts += [f"*No complete run: {error}*", ""]
            continue
        sidecars = [name for name in sorted(record["files"]) if name.endswith(".json")]
        for name in sidecars:
            parts += _wall_entry(directory, json.loads((directory / name).read_text("utf-8")))
        if again := record.get("repetitions"):
            links = [
                f"[seed {other['seed']}]"
                f"({os.path.relpath(repository_root() / other['folder'], folder)})"
                for other in again
            ]
            parts += [f"Pictures of seed {record['seed']}, values over the seeds; pictures of the "
                      f"others: {', '.join(links)}.", ""]  # fmt: skip
        if record["values"]:
            parts += ["| claim | quantity | value | n | paper |", "|---|---|---|---|---|"]
            for v in record["values"]:
                paper = "" if v["paper"] is None else f"{v['paper']:.4g}"
                cells = (v["claim"], v["name"], _measured(v), str(v["n"]), paper)
                parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
            parts.append("")
    path = folder / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return path


def _wall_entry(directory: Path, sidecar: Mapping[str, Any]) -> list[str]:
    stem = f"{directory.name}/{sidecar['name']}"
    links = [f"[{Path(n).suffix[1:]}]({directory.name}/{n})" for n in sidecar["files"]]
    links = [link for link in links if not link.startswith("[png]")]
    links.append(f"[how it was made]({stem}.json)")
    alt = " ".join(sidecar["alt"].split()).replace("[", "(").replace("]", ")")
    picture = [f"![{alt}]({stem}.png)", ""] if sidecar["kind"] == "figure" else []
    title = sidecar["caption"] or sidecar["name"]
    text = f"**{sidecar['scale']}** · {title} · {' · '.join(links)}"
    return [*picture, text, "", f"`{sidecar['command']}`", ""]


# A README names the values that it wants to show; what stands below the marker is never typed in.
RESULTS = re.compile(
    r"(?P<open><!-- results (?P<preset>\w+):(?P<wanted>[^>]*?)-->\n)"
    r".*?(?P<close><!-- /results -->)",
    re.DOTALL,
)


def fill_results(text: str) -> str:
    """Return `text` with every table between result markers made anew from the records.

    A marker lists ``claim/name`` pairs, one per line. A value that no whole run recorded is shown
    as not run, never left out.
    """
    return RESULTS.sub(_results_table, text)


def _results_table(marker: re.Match[str]) -> str:
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for directory in sorted((figures_root() / marker["preset"]).glob("*/")):
        with suppress(RecordError):
            for value in read_run(directory)["values"]:
                found[f"{value['claim']}/{value['name']}"] = directory.name, value
    lines = ["| claim | quantity | measured | n | paper | notebook |", "|---|---|---|---|---|---|"]
    for wanted in marker["wanted"].split():
        claim, _, name = wanted.partition("/")
        cells = [claim, name.replace("_", " "), "not run", "", "", ""]
        if wanted in found:
            notebook, value = found[wanted]
            paper = "–" if value["paper"] is None else f"{value['paper']:.4g}"
            link = f"[{notebook[:2]}](notebooks/{notebook}.ipynb)"
            cells[2:] = _measured(value), str(value["n"]), paper, link
        lines.append("| " + " | ".join(cells) + " |")
    return marker["open"] + "\n".join(lines) + "\n" + marker["close"]
