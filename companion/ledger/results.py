"""All recorded numbers of a preset as one tidy table, ``data/results/<preset>.csv``.

One row per value, as the notebooks recorded it; the JSON beside it says for each notebook which
run the rows come from and where its other tables lie. Made from the records alone. Where a preset
repeats a notebook at further seeds, a value is the mean over all of them (`read_run`).
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from companion.runs import (
    RECORD,
    REPETITIONS,
    RecordError,
    Value,
    figures_root,
    read_record,
    repository_root,
    write_json,
)
from dsvlib._errors import explain
from dsvlib._files import atomic_path, file_digest

COLUMNS = (
    *("preset", "notebook", "claim", "quantity", "value", "std", "low", "high", "n", "seeds"),
    *("unit", "paper_value", "scale", "note"),
)
ABOUT = (
    *("scale", "command", "seed", "parameters", "data_digest", "code", "checkpoints", "commit"),
    *("dirty", "environment", "seconds", "finished", "repetitions"),
)
SAME = ("code", "data_digest", "checkpoints")  # in all runs that are taken together


def whole_runs(preset: str, root: Path | None = None) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return folder and record of a preset's whole runs; a record that is there must be sound.

    `root` is the place where they lie, by default that of the recorded ones.
    """
    folders = sorted((root or figures_root()).joinpath(preset).glob("*/"))
    return {path.name: (path, read_run(path)) for path in folders if (path / RECORD).exists()}


def read_run(directory: Path) -> dict[str, Any]:
    """Return the record of a whole run, its values taken together with those of its repetitions.

    A value becomes the mean over the seeds, with their standard deviation, and `repetitions` says
    where the others lie. Raises RecordError for a record that is not sound, and for a repetition
    by other code, data or parameters, which are not the same experiment.
    """
    record = read_record(directory)
    folders = repetitions(directory)
    if not folders:
        return record
    others = [read_record(folder) for folder in folders]
    for other in others:
        if _experiment(other) != _experiment(record):
            raise RecordError(
                f"{record['preset']}/{record['notebook']}: expected repetitions by the same code, "
                f"data and parameters, got others at seed {other['seed']}; run "
                f"dsv reproduce --preset {record['preset']} --only {record['notebook']}"
            )
    about = ("seed", "commit", "dirty", "seconds", "finished")
    listed = [
        {"folder": folder.relative_to(repository_root()).as_posix()}
        | {name: other[name] for name in about}
        | {"record": file_digest(folder / RECORD)}
        for folder, other in zip(folders, others, strict=True)
    ]
    values = over_seeds([record, *others])
    return record | {"values": [asdict(value) for value in values], "repetitions": listed}


def repetitions(directory: Path) -> list[Path]:
    """Return where the same notebook of the same preset was published at further seeds."""
    preset, notebook = directory.parts[-2:]
    found = directory.parents[1].joinpath(REPETITIONS).glob(f"*/{preset}/{notebook}/{RECORD}")
    return sorted((path.parent for path in found), key=lambda folder: int(folder.parts[-3]))


def _experiment(record: Mapping[str, Any]) -> list[Any]:
    return [{**record["parameters"], "seed": None}, *(record.get(name) for name in SAME)]


def over_seeds(records: Sequence[Mapping[str, Any]]) -> list[Value]:
    """Return every value of runs that differ in their seed as mean, deviation, n and seeds.

    What one run alone recorded, such as a threshold that others never reached, stays as it is; the
    note tells.
    """
    found: dict[tuple[str, str], dict[int, Value]] = {}
    for record in records:
        for value in values_of(record):
            found.setdefault((value.claim, value.name), {})[record["seed"]] = value
    return [_mean(by_seed, [record["seed"] for record in records]) for by_seed in found.values()]


def _mean(by_seed: Mapping[int, Value], seeds: Sequence[int]) -> Value:
    first = next(iter(by_seed.values()))
    numbers = [value.value for value in by_seed.values()]
    part = f"recorded at {len(by_seed)} of {len(seeds)} seeds" if len(by_seed) < len(seeds) else ""
    if len(by_seed) == 1:
        return replace(first, note="; ".join(filter(None, [part, first.note])))
    own = f"seed {next(iter(by_seed))}: {first.note}" if first.note else ""
    about = f"mean over seeds, n = {first.n} at each"
    return replace(
        first,
        value=statistics.fmean(numbers),
        std=statistics.stdev(numbers),
        low=None,
        high=None,
        n=len(numbers),
        seeds=tuple(seed for value in by_seed.values() for seed in value.seeds),
        note="; ".join(filter(None, [part, about, own])),
    )


def values_of(record: Mapping[str, Any]) -> list[Value]:
    """Return the values of a record."""
    return [Value(**{**entry, "seeds": tuple(entry["seeds"])}) for entry in record["values"]]


def measured(value: float, std: float | None, unit: str) -> str:
    """Return a value and its unit as text, with two digits of the standard deviation."""
    places = max(0, 1 - math.floor(math.log10(std))) if std and math.isfinite(std) else None
    if std is None:
        text = f"{value:.3g}"
    elif places is None or places > 8:
        text = f"{value:.4g} ± {std:.2g}"
    else:
        text = f"{value:.{places}f} ± {std:.{places}f}"
    return f"{text} {unit}".rstrip()


def value_cells(value: Value) -> list[str]:
    """Return a value as cells of a CSV: from its name to the paper's, in the order of `COLUMNS`."""
    own = ["" if x is None else repr(x) for x in (value.std, value.low, value.high)]
    seeds = " ".join(map(str, value.seeds))
    paper = "" if value.paper is None else f"{value.paper:.6g}"
    return [value.name, repr(value.value), *own, str(value.n), seeds, value.unit, paper]


def results(preset: str) -> tuple[str, dict[str, Any]]:
    """Return the table of a preset's recorded runs as CSV, and what its sidecar says.

    Raises RecordError for a run that was changed after it was published.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    runs: dict[str, Any] = {}
    for notebook, (directory, record) in whole_runs(preset).items():
        for value in values_of(record):
            cells = [preset, notebook, value.claim, *value_cells(value)]
            writer.writerow([*cells, record["scale"], value.note])
        tables = sorted(name for name in record["files"] if name.endswith(".csv"))
        runs[notebook] = {name: record[name] for name in ABOUT if name in record} | {
            "record": file_digest(directory / RECORD),
            "tables": [f"figures/{preset}/{notebook}/{name}" for name in tables],
        }
    return table.getvalue(), {"preset": preset, "columns": COLUMNS, "runs": runs}


def write_results(preset: str) -> list[Path]:
    """Write ``data/results/<preset>.csv`` and ``.json`` and return their paths."""
    text, about = results(preset)
    stem = repository_root() / "data" / "results" / preset
    table, sidecar = stem.with_suffix(".csv"), stem.with_suffix(".json")
    with explain("write to", stem.parent):
        with atomic_path(table) as temporary:
            temporary.write_text(text, encoding="utf-8")
        write_json(sidecar, about | {"files": {table.name: file_digest(table)}})
    return [table, sidecar]
