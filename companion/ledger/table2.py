"""One cell of Table 2 again, by the very code of notebook 05 and the parameters of a recorded run.

The notebook's cells tagged `protocol` define how a set is made and how a network learns from it.
They are executed here, not copied, so that a cell that is run again cannot drift from the table.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from companion.presets import read_parameters
from companion.runs import figures_root, read_record, repository_root, tagged_cells
from dsvlib._errors import RequestError

NOTEBOOK = "05_fewshot_retraining"
TAGS = {"parameters", "protocol"}


@dataclass(frozen=True)
class TableCell:
    """What a run recorded for one method, images per class and shot, and its parameters.

    `mean` and `std` are test accuracies in %, over `count` seeds from `seed` on.
    """

    method: str
    size: int
    shot: int
    mean: float
    std: float
    count: int
    seed: int
    preset: str
    parameters: dict[str, Any] = field(repr=False)

    def holds(self, accuracies: Sequence[float]) -> bool:
        """Return whether the mean of new accuracies lies within one recorded std of the mean."""
        return abs(statistics.fmean(accuracies) - self.mean) <= self.std


def recorded_cell(method: str, size: int, shot: int, *, preset: str) -> TableCell:
    """Return one cell of Table 2 (field protocol) as recorded.

    Raises RecordError where the preset has no whole run of the notebook, RequestError for a cell
    that it does not hold.
    """
    folder = figures_root() / preset / NOTEBOOK
    record = read_record(folder)
    with (folder / "table2.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["protocol"] == "field"]
    known = {(row["method"], int(row["size"]), int(row["shot"])): row for row in rows}
    if (method, size, shot) not in known:
        names = [f"{name} {k} {s}" for name, k, s in known]
        raise RequestError.unknown(f"cell of Table 2 at {preset}", f"{method} {size} {shot}", names)
    row = known[method, size, shot]
    return TableCell(
        method=method,
        size=size,
        shot=shot,
        mean=float(row["mean"]),
        std=float(row["std"]),
        count=int(row["count"]),
        seed=record["seed"],
        preset=preset,
        parameters=record["parameters"],
    )


def rerun(
    cell: TableCell,
    *,
    data_root: str | None = None,
    device: str = "auto",
    seeds: Sequence[int] | None = None,
    echo: Callable[[str], object] = print,
) -> list[float]:
    """Make the cell's sets and train its networks again; return the test accuracies in %.

    `seeds` default to those of the record; each decides the images seen, the set and the network.
    Parameters that an older record has and the notebook has no more are told, not used.
    """
    wanted = cell.parameters | {"preset": cell.preset, "seed": cell.seed}
    wanted |= {"device": device, "data_root": data_root or ""}
    for name in sorted(set(wanted) - set(read_parameters(NOTEBOOK).model_fields)):
        echo(
            f"the recorded run had {name} = {wanted.pop(name)!r}, which {NOTEBOOK} now fixes itself"
        )
    scope = _protocol(wanted)
    found = []
    for seed in seeds or range(cell.seed, cell.seed + cell.count):
        samples = scope["make"](cell.method, cell.size, cell.shot, seed)
        score = scope["teach"](samples, scope["protocol"]("field", cell.size), seed)
        echo(f"seed {seed}: {score:.1f} %")
        found.append(float(score))
    return found


def _protocol(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return what the notebook's tagged cells define, with `parameters` in place of its own."""
    path = repository_root() / "notebooks" / f"{NOTEBOOK}.ipynb"
    scope: dict[str, Any] = {"__name__": NOTEBOOK}
    for source, tags in tagged_cells(path):
        if tags & TAGS:
            exec(compile(source, path.name, "exec"), scope)
        if "parameters" in tags:
            scope |= parameters
    return scope
