"""From numbers to a verdict: rules, findings, and what they say together."""

from __future__ import annotations

import csv

import pytest

from companion.ledger.claims import claim_rows
from companion.ledger.verdicts import Rule, Verdict, findings, verdict
from companion.runs import Value, figures_root


def value(name: str, number: float, *interval: float) -> Value:
    low, high = interval or (None, None)
    return Value("X", name, number, n=5, low=low, high=high)


@pytest.mark.parametrize(
    ("rule", "number", "interval", "found"),
    [
        ("gain > 0", 1.0, (0.1, 2.0), "shown"),
        ("gain > 0", 1.0, (-0.1, 2.0), "undecided"),
        ("gain > 0", -1.0, (-2.0, -0.1), "not shown"),
        ("gain > 0", 1.0, (), "undecided"),  # one seed has no interval, and shows nothing
        ("gain > 5", 9.0, (4.0, 14.0), "undecided"),
        ("gain > 5", 3.0, (1.0, 5.0), "not shown"),
        ("gain < 0", -1.0, (-2.0, -0.1), "shown"),
        ("gain < 0", 1.0, (0.1, 2.0), "not shown"),
        ("gain < 0", 0.0, (-1.0, 1.0), "undecided"),
        ("gain ≥ 80", 80.0, (70.0, 90.0), "shown"),
        ("gain ≥ 80", 79.9, (), "not shown"),
        ("gain ≤ -0.5", -0.5, (), "shown"),
        ("gain ≤ 30", 31.0, (), "not shown"),
    ],
)
def test_a_rule_looks_at_the_interval_or_at_the_value(
    rule: str, number: float, interval: tuple[float, ...], found: str
) -> None:
    assert Rule.read(rule).finding(value("gain", number, *interval)) == found


@pytest.mark.parametrize("text", ["gain", "gain >= 3", "gain > ", "> 3", "a b > 3", "gain > x"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a rule like"):
        Rule.read(text)


def test_stars_match_names_and_nothing_else() -> None:
    values = [value("gain_1", 1, 0.5, 2), value("gain_10", 1, -1, 2), value("loss_1", 9)]
    found = findings(values, [Rule.read("gain_* > 0")], [Rule.read("other ≥ 1")])
    assert [(f.found, f.necessary) for f in found] == [
        ("shown", True), ("undecided", True), ("undecided", False),
    ]  # fmt: skip
    assert [f.ours for f in found] == ["1 [0.5, 2]", "1 [-1, 2]", "not measured"]


def _verdict(necessary: list[str], further: list[str]) -> Verdict:
    """Return the verdict where these findings come from these rules."""
    numbers = {"shown": 1.0, "not shown": -1.0}
    intervals = {"shown": (0.5, 2.0), "undecided": (-1.0, 1.0), "not shown": (-2.0, -0.5)}
    values, rules = [], ([], [])
    for part, words in zip(rules, (necessary, further), strict=True):
        for word in words:
            name = f"v{len(values)}"
            part.append(Rule.read(f"{name} > 0"))
            if word != "not measured":
                values.append(value(name, numbers.get(word, 0.0), *intervals[word]))
            else:
                values.append(value("another", 0.0))
    return verdict(findings(values, *rules))


@pytest.mark.parametrize(
    ("necessary", "further", "word"),
    [
        (["shown"], [], "reproduced"),
        (["shown", "shown"], ["shown"], "reproduced"),
        (["shown"], ["not shown"], "partly"),
        (["shown"], ["shown", "undecided"], "partly"),
        (["shown"], ["not measured"], "partly"),
        (["not shown"], ["shown", "shown"], "not reproduced"),
        (["undecided", "not shown"], ["shown"], "not reproduced"),
        (["shown", "undecided"], ["shown"], "undecided"),
        (["shown", "not measured"], [], "undecided"),
        (["not measured"], ["shown"], "not attempted"),
    ],
)
def test_a_claim_stands_and_falls_with_its_necessary_part(
    necessary: list[str], further: list[str], word: str
) -> None:
    assert _verdict(necessary, further) == word


@pytest.mark.parametrize("preset", ["quick", "cifar10"])
def test_what_recorded_notebooks_show_is_what_the_rules_say_today(preset: str) -> None:
    """A rule that is changed after a recording changes the ledger, and must change notebooks."""
    shown = {}
    for table in sorted((figures_root() / preset).glob("*/verdicts.csv")):
        for line in csv.DictReader(table.open(encoding="utf-8")):
            shown[line["claim"]] = line["verdict"]
    judged = {row.id: row.verdict.value for row in claim_rows(preset)
              if row.verdict is not Verdict.NOT_ATTEMPTED}  # fmt: skip
    assert judged
    for claim, word in judged.items():
        allowed = {word, "reproduced"} if word == "partly" else {word}  # seeds, the blind test
        assert shown[claim] in allowed, claim
