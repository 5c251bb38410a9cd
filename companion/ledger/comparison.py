"""One's own values beside the recorded ones: what a run repeats, what not, and by how much."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.ledger.results import measured, read_run, values_of
from companion.runs import RECORD, RecordError, Value, repository_root
from dsvlib._files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.05  # of a recorded value without a standard deviation, whose spread nobody measured
ROUNDING = 1e-6, 1e-6  # relative and absolute: what another order of summation may change
TIMES = ("s", "ms")  # units of values that say how fast a machine is
LINES = 12  # of the printed table
COLUMNS = ("claim", "quantity", "recorded", "std", "own", "difference", "allowed", "verdict")


def compare(own: Sequence[Value], recorded: Sequence[Value]) -> pd.DataFrame:
    """Return one row per value of either side: recorded, own, their difference, and a verdict.

    A value is ``repeated`` where |own − recorded| is at most the recorded standard deviation, or
    `TOLERANCE` of a recorded value that has none; up to `ROUNDING` any two numbers are the same.
    Otherwise it is ``not repeated``, ``only recorded``, ``only own``, or a ``time``, which depends
    on the machine.
    """
    import pandas as pd

    ours = {(value.claim, value.name): value for value in own}
    theirs = {(value.claim, value.name): value for value in recorded}
    rows = []
    for key in dict.fromkeys([*theirs, *ours]):
        mine, known = ours.get(key), theirs.get(key)
        difference, allowed = None, None
        if mine is None or known is None:
            verdict = "only recorded" if known else "only own"
        else:
            difference = mine.value - known.value
            spread = known.std or TOLERANCE * abs(known.value)
            allowed = max(spread, ROUNDING[0] * abs(known.value), ROUNDING[1])
            verdict = "repeated" if abs(difference) <= allowed else "not repeated"
            verdict = "time" if known.unit in TIMES else verdict
        numbers = [known and known.value, known and known.std, mine and mine.value]
        rows.append([*key, *numbers, difference, allowed, verdict])
    numeric = dict.fromkeys(COLUMNS[2:-1], float)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(numeric)


def compare_with_recorded(runs: Mapping[str, tuple[Path, Path]], table: Path) -> str:
    """Compare whole runs, by notebook (own folder, recorded folder), and return it in words.

    The whole comparison is written to `table` as CSV. A notebook that was recorded with other
    parameters is another experiment: it is named and not compared.
    """
    import pandas as pd

    frames, lines = [], []
    not_compared: dict[str, list[str]] = {}
    for notebook, (own_folder, recorded_folder) in runs.items():
        if not (recorded_folder / RECORD).exists():
            not_compared.setdefault("no recorded run", []).append(notebook[:2])
            continue
        try:
            own, recorded = read_run(own_folder), read_run(recorded_folder)
        except RecordError as error:
            not_compared.setdefault(str(error), []).append(notebook[:2])
            continue
        if _experiment(own) != _experiment(recorded):
            why = "recorded with other parameters"
            not_compared.setdefault(why, []).append(notebook[:2])
        elif len(frame := compare(values_of(own), values_of(recorded))):
            frame.insert(0, "notebook", notebook)
            frames.append(frame)
    if frames:
        whole = pd.concat(frames, ignore_index=True)
        with atomic_path(table) as temporary:
            whole.to_csv(temporary, index=False, lineterminator="\n")
        lines = [*_report(whole), f"all of them: {os.path.relpath(table, repository_root())}"]
    lines += [f"not compared: {', '.join(names)}, {why}" for why, names in not_compared.items()]
    return "\n".join(lines)


def _experiment(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs must share to be compared; another device is what comparing is for."""
    return {**record["parameters"], "device": None}


def _report(whole: pd.DataFrame) -> list[str]:
    """Return how many values are repeated, and those that are not as a table, farthest first."""
    both = whole[whole.verdict.isin(["repeated", "not repeated"])]
    missed = both[both.verdict == "not repeated"]
    lines = [
        f"{len(both) - len(missed)} of {len(both)} recorded values repeated within their spread "
        f"(one standard deviation; {TOLERANCE:.0%} where a value has none)"
    ]
    lines += [
        f"{count} {verdict}" for verdict, count in whole.verdict.value_counts().items()
        if str(verdict).startswith("only")
    ]  # fmt: skip
    if len(missed):
        ratio = (missed.difference.abs() / missed.allowed).sort_values(ascending=False)
        far = missed.loc[ratio.index[:LINES]]
        far = far.assign(notebook=far.notebook.str[:2])
        shown = far[["notebook", "claim", "quantity"]].assign(
            recorded=[
                measured(value, None if math.isnan(std) else std, "")
                for value, std in zip(far.recorded, far["std"], strict=True)
            ],
            here=far.own.map("{:.4g}".format),
            difference=far.difference.map("{:+.2g}".format),
            of_what_is_allowed=[f"{r:.1f}" if r < 1000 else "> 1000" for r in ratio[:LINES]],
        )
        lines.append(shown.to_string(index=False))
    return lines + ([f"… and {len(missed) - LINES} more"] if len(missed) > LINES else [])
