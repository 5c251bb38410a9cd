"""From numbers to a verdict: the one rule, for every claim of claims.yml.

A **rule** names recorded values (``*`` for any letters), how they compare, and a number:

    name > 0    the value's 95 % interval lies above 0; undecided where it holds 0
                or where there is none, as of a single seed
    name < 0    the same, below
    name ≥ 80   the value itself is at least 80, without an interval: shares, counts, controls
    name ≤ 30   the same, at most

Where several comparisons serve one claim their intervals hold together (`difference` with
``comparisons``). Every value that a rule matches gives a **finding**.

A **verdict** follows from the findings. Where a *necessary* one fails, the claim is not reproduced;
where one is undecided, so is the claim. Where all are shown it is reproduced if all *further* ones
are shown as well, else partly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import NamedTuple

from companion.ledger.results import measured
from companion.runs import Value

SIGNS = {">": 1, "<": -1, "≥": 1, "≤": -1}


class Verdict(StrEnum):
    """What the measured numbers say about a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    UNDECIDED = "undecided"
    NOT_REPRODUCED = "not reproduced"
    NOT_ATTEMPTED = "not attempted"


class Rule(NamedTuple):
    """What values must fulfil: ``name``, one of ``> < ≥ ≤``, ``number``; and the same in words."""

    name: str
    sign: str
    number: float
    words: str

    @classmethod
    def read(cls, text: str, words: str = "") -> Rule:
        """Read ``"gain_* > 0"``; raises ValueError for what is no rule."""
        found = re.fullmatch(r"([\w*-]+) ([<>≥≤]) (-?[\d.]+)", text)
        if not found:
            raise ValueError(f"expected a rule like 'gain_* > 0' or 'share ≥ 80', got {text!r}")
        return cls(found[1], found[2], float(found[3]), words)

    def matches(self, value: Value) -> bool:
        """Return whether this rule is about that value."""
        return fnmatchcase(value.name, self.name)

    def finding(self, value: Value) -> str:
        """Return ``"shown"``, ``"undecided"`` or ``"not shown"``."""
        sign = SIGNS[self.sign]
        if self.sign in "≥≤":
            return "shown" if sign * (value.value - self.number) >= 0 else "not shown"
        if value.low is None or value.high is None:
            return "undecided"
        near, far = sorted((sign * (value.low - self.number), sign * (value.high - self.number)))
        return "shown" if near > 0 else "not shown" if far <= 0 else "undecided"


class Finding(NamedTuple):
    """One value under one rule."""

    necessary: bool
    rule: Rule
    value: Value | None  # None where nothing that the rule is about was measured
    found: str

    @property
    def name(self) -> str:
        """The name of the value, or what the rule asks for where nothing was measured."""
        return self.value.name if self.value else self.rule.name

    @property
    def needed(self) -> str:
        """What the rule asks of the value, such as ``≥ 80``."""
        return f"{self.rule.sign} {self.rule.number:g}"

    @property
    def ours(self) -> str:
        """The value in words, with its interval where the rule looks at that."""
        if self.value is None:
            return "not measured"
        text = measured(self.value.value, None, self.value.unit)
        if self.rule.sign in "<>" and self.value.low is not None:
            text += f" [{self.value.low:.3g}, {self.value.high:.3g}]"
        return text


def findings(
    values: Iterable[Value], necessary: Sequence[Rule], further: Sequence[Rule]
) -> list[Finding]:
    """Return what each rule finds in the values, the necessary rules first."""
    values = list(values)
    found = []
    for rule in (*necessary, *further):
        about: list[Value | None] = [value for value in values if rule.matches(value)]
        for value in about or [None]:
            word = "undecided" if value is None else rule.finding(value)
            found.append(Finding(rule in necessary, rule, value, word))
    return found


def verdict(found: Sequence[Finding]) -> Verdict:
    """Return what the findings say of the claim that they are about."""
    needed = [f for f in found if f.necessary]
    if all(f.value is None for f in needed):
        return Verdict.NOT_ATTEMPTED
    words = {f.found for f in needed}
    if "not shown" in words:
        return Verdict.NOT_REPRODUCED
    if "undecided" in words:
        return Verdict.UNDECIDED
    further = all(f.found == "shown" for f in found)
    return Verdict.REPRODUCED if further else Verdict.PARTLY
