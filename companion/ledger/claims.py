"""The claim ledger: every claim of the papers, what was measured, and whether it holds.

``claims.yml`` says what is claimed, where it is tested and by which rules it counts. Numbers come
from the notebooks' records, verdicts from numbers and rules (``verdicts.py``), so that none is
typed in. A claim that has not been run is in the ledger all the same.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from companion.blind_test import NAME, BlindTest
from companion.ledger.results import measured, repetitions, value_cells, values_of, whole_runs
from companion.ledger.verdicts import Finding, Rule, Verdict, findings
from companion.ledger.verdicts import verdict as judge
from companion.presets import check_preset, checked, notebook_names, read_presets
from companion.runs import BADGES, RecordError, Run, Value, figures_root, read_record
from dsvlib._errors import DsvError, RequestError, explain
from dsvlib._files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

CLAIMS = Path(__file__).with_name("claims.yml")
# The word stands beside the colour, which not everybody sees; red means that it did not hold.
SIGNS = {
    Verdict.REPRODUCED: "🟢",
    Verdict.PARTLY: "🟡",
    Verdict.UNDECIDED: "⚪",
    Verdict.NOT_REPRODUCED: "🔴",
    Verdict.NOT_ATTEMPTED: "⚫",
}
COLUMNS = (
    *("claim", "group", "where", "statement", "notebook", "preset", "scale"),
    *("quantity", "value", "std", "low", "high", "n", "seeds", "unit", "paper_value"),
    *("paper", "tolerance", "verdict", "reason"),
)


class Claim(BaseModel, extra="forbid", frozen=True):
    """One entry of claims.yml; `group` is ``papers`` or ``ours``."""

    id: str
    group: str
    where: str = ""
    statement: str = ""
    paper: str = "–"
    notebook: str = ""
    headline: dict[str, str] = {}
    necessary: dict[str, str] = {}  # a rule, and the same in words
    further: dict[str, str] = {}
    blind_test: bool = False

    @property
    def tolerance(self) -> str:
        """What counts as reproduced, in the words of claims.yml."""
        parts = list(self.necessary.values())
        more = list(self.further.values())
        more += ["the site's blind test is of this run"] if self.blind_test else []
        return "; ".join(parts) + (f"; else partly: {'; '.join(more)}" if more else "")

    def findings(self, values: Iterable[Value]) -> list[Finding]:
        """Return what the rules find in the values of this claim; raises ValueError for no rule."""
        rules = [[Rule.read(*item) for item in part.items()]
                 for part in (self.necessary, self.further)]  # fmt: skip
        return findings((value for value in values if value.claim == self.id), *rules)


class ClaimRow(Claim, frozen=True):
    """One claim at one scale, with its headline numbers, none where nothing was run."""

    preset: str
    scale: str
    numbers: tuple[Value, ...]
    verdict: Verdict
    reason: str

    @property
    def measured(self) -> str:
        """Our values as text, each with its spread and n, in the words of claims.yml if any."""
        words = {n.name: n.name.replace("_", " ") for n in self.numbers}
        words |= self.headline
        parts = [f"{words[n.name]}: {measured(n.value, n.std, n.unit)} (n = {n.n})"
                 for n in self.numbers]  # fmt: skip
        return "; ".join(parts) or "–"


def claim_rows(preset: str = "quick", root: Path | None = None) -> list[ClaimRow]:
    """Return the ledger of a preset, in the order of the papers, then our own questions.

    `root` is the place of the runs: the recorded ones by default, or `companion.runs.own_root`.
    Raises RequestError for an unknown preset, RecordError for a record that was changed or does
    not fit its files, DsvError if claims.yml cannot be read.
    """
    presets = read_presets()
    check_preset(preset, presets)
    claims = _read_claims()
    records = whole_runs(preset, root)
    listed = {claim.id for claim in claims}
    for notebook, (_, record) in records.items():  # what a notebook records is never left out
        for claim in dict.fromkeys(value["claim"] for value in record["values"]):
            if claim not in listed:
                listed.add(claim)
                claims.append(Claim(id=claim, group="ours", where="our own", notebook=notebook))
    return [_row(claim, preset, presets[preset]["omit"], records) for claim in claims]


def claim_ids() -> set[str]:
    """Return the ids of all claims that a notebook may name."""
    return {claim.id for claim in _read_claims()}


def _read_claims() -> list[Claim]:
    try:
        content = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
        claims = []
        for group in ("papers", "ours"):
            for name, entry in content[group].items():
                where = f"claims.yml: {name}"
                about = checked(Claim, {"id": name, "group": group} | entry, where, "key of")
                claims.append(Claim(**about))
                claims[-1].findings([])  # its rules can be read
        return claims
    except RequestError:
        raise
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DsvError(
            f"claims.yml: expected 'papers' and 'ours' with one entry per claim, got {reason}"
        ) from error


def _row(
    claim: Claim,
    preset: str,
    omitted: Mapping[str, str],
    records: Mapping[str, tuple[Path, dict[str, Any]]],
) -> ClaimRow:
    numbers: tuple[Value, ...] = ()
    scale = BADGES.get(preset, preset)
    if claim.notebook in records:
        directory, record = records[claim.notebook]
        scale = record["scale"]
        numbers = _headline(claim, record)
        if preset == "smoke":
            verdict = Verdict.NOT_ATTEMPTED
            reason = "a smoke run shows only that everything runs"
        else:
            verdict, reason = _over_seeds(claim, directory, record)
            if claim.blind_test and verdict is Verdict.REPRODUCED:
                missing = _not_asked(directory)
                verdict = Verdict.PARTLY if missing else verdict
                reason = f"{reason}; {missing or 'its blind test is on the site'}"
    else:
        verdict, reason = Verdict.NOT_ATTEMPTED, _why_not(claim, preset, omitted)
    found = {"numbers": numbers, "verdict": verdict, "reason": reason}
    return ClaimRow.model_validate(claim.model_dump() | {"preset": preset, "scale": scale} | found)


def _why_not(claim: Claim, preset: str, omitted: Mapping[str, str]) -> str:
    if claim.notebook in omitted:
        return f"not part of this preset: {omitted[claim.notebook]}"
    if claim.notebook not in notebook_names():
        return f"there is no notebook {claim.notebook} yet"
    return f"no run yet: dsv reproduce --preset {preset} --only {claim.notebook[:2]}"


def _headline(claim: Claim, record: Mapping[str, Any]) -> tuple[Value, ...]:
    """Return the values that the claim names, or else the first three recorded for it."""
    recorded = {value.name: value for value in values_of(record) if value.claim == claim.id}
    named = [recorded[name] for name in claim.headline if name in recorded]
    return tuple(named or list(recorded.values())[:3])


def _over_seeds(claim: Claim, directory: Path, record: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Return the verdict at all seeds of a run: the one that they agree on, else partly.

    The repetitions' files are known to be sound and to be the same, since `read_run` was here.
    """
    if "repetitions" not in record:
        return _verdict(claim, record)
    runs = [read_record(folder) for folder in (directory, *repetitions(directory))]
    found = {run["seed"]: _verdict(claim, run) for run in runs}
    words = [word for word, _ in found.values()]
    own, (verdict, reason) = next(iter(found.items()))
    if len(set(words)) == 1:
        others = " and ".join(f"seed {seed}" for seed in list(found)[1:])
        return verdict, f"seed {own}: {reason}; the same verdict at {others}"
    others = ", ".join(f"seed {seed} {word}" for seed, (word, _) in list(found.items())[1:])
    return Verdict.PARTLY, f"seed {own}: {reason}; {others}"


def _verdict(claim: Claim, record: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Return what one run says of a claim, and what was found as the reason."""
    if not claim.necessary:
        return Verdict.NOT_ATTEMPTED, "recorded without a rule"
    found = claim.findings(values_of(record))
    said = (f"{f.name.replace('_', ' ')} {f.ours}, {f.needed} {f.found}" for f in found)
    return judge(found), "; ".join(said)


def verdicts(run: Run) -> pd.DataFrame:
    """Judge what a run has recorded so far by the rules of its notebook's claims.

    Saved as its table ``verdicts`` and returned: one row a finding, ``claim``, ``part``
    (necessary or further), ``criterion``, ``quantity``, ``ours``, ``needed``, ``finding`` and the
    claim's ``verdict``, which a smoke run does not give.
    """
    import pandas as pd

    rows = []
    for claim in _read_claims():
        if claim.notebook != run.notebook:
            continue
        found = claim.findings(run.values.values())
        word = Verdict.NOT_ATTEMPTED if run.preset == "smoke" else judge(found)
        for f in found:
            part = "necessary" if f.necessary else "further"
            own = (f.rule.words, f.name, f.ours, f.needed, f.found)
            rows.append((claim.id, part, *own, word.value))
    columns = ["claim", "part", "criterion", "quantity", "ours", "needed", "finding", "verdict"]
    caption = "A claim is what its necessary findings say; partly where a further one is missing."
    return run.save_table(pd.DataFrame(rows, columns=columns), "verdicts", caption=caption)


def blind_test_folder(root: Path | None = None) -> Path | None:
    """Return where the blind test of the site lies: that of the first preset that has one.

    `root` is the place of the runs, by default that of the recorded ones. A smoke run is no result.
    """
    root = root or figures_root()
    for preset in (name for name in read_presets() if name != "smoke"):
        for sidecar in sorted(root.joinpath(preset).glob(f"*/{NAME}.json")):
            try:
                read_record(sidecar.parent)
            except RecordError:  # the page of that preset says so
                continue
            return sidecar.parent
    return None


def _not_asked(directory: Path) -> str:
    """Return why people cannot be asked whether they read a run's pictures, "" where they can."""
    shown = blind_test_folder(directory.parents[1])
    if not (directory / f"{NAME}.json").is_file() or shown is None:
        return "without a blind test, so that nobody can say whether people read them"
    if BlindTest.load(directory).digest != BlindTest.load(shown).digest:
        return f"the site's blind test is another, of {shown.parent.name}/{shown.name}"
    return ""


def write_claims(preset: str = "quick") -> list[Path]:
    """Write the ledger of a preset's recorded runs as ``figures/claims/<preset>.csv`` and ``.md``.

    The CSV has one line per claim and headline value, so that a number stays a number.
    """
    rows = claim_rows(preset)
    stem = figures_root() / "claims" / preset
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        about = [row.id, row.group, row.where, row.statement, row.notebook, row.preset, row.scale]
        end = [row.paper, row.tolerance, row.verdict.value, row.reason]
        for value in row.numbers or (None,):
            cells = [""] * 7 if value is None else value_cells(value)
            writer.writerow([*about, *cells, *end])
    text = f"# Claims at preset {preset}\n\n"
    text += f"Written by `dsv record`; `dsv claims --scale {preset}` shows it.\n\n"
    written = []
    with explain("write to", stem.parent):
        for suffix, content in (
            (".csv", table.getvalue()),
            (".md", text + markdown(rows, "../../notebooks") + "\n"),
        ):
            path = stem.with_name(preset + suffix)
            with atomic_path(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
            written.append(path)
    return written


def markdown(rows: Iterable[ClaimRow], notebooks: str = "notebooks") -> str:
    """Return the ledger as a Markdown table; `notebooks` is the way to their folder."""
    lines = [
        "| claim | in our words | measured | paper | counts as reproduced | verdict | notebook |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exists = row.notebook in notebook_names()
        link = f"[{row.notebook[:2]}]({notebooks}/{row.notebook}.ipynb)"
        cells = [f"**{row.id}** {row.where}", row.statement, row.measured, row.paper]
        cells += [row.tolerance, f"{SIGNS[row.verdict]} **{row.verdict}**: {row.reason}"]
        cells.append(f"{link} · {row.scale}" if exists else "–")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
