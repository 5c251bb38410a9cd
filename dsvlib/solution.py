"""What every solver returns: the samples, what happened, how it went and how good they are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pandas as pd

from dsvlib.conditions import Residuals
from dsvlib.samples import SupportSet


class Status(Enum):
    """How a solver ended; the value is a sentence for people."""

    CONVERGED = "The loss stopped changing within the tolerance."
    ALL_STEPS = "All steps were run."
    NON_FINITE = "A loss or gradient became NaN or infinite; the samples are the last finite ones."
    NO_CANDIDATES = "Every candidate's multiplier turned negative; the samples are the last ones."

    @property
    def successful(self) -> bool:
        """Whether the samples are what was asked for."""
        return self in (Status.CONVERGED, Status.ALL_STEPS)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False)
class Solution:
    """Result of `synthesize`, `fit_multipliers`, `match_gradients` and `match_distributions`.

    `history` is tidy, one row per logged step with unweighted loss terms; `residuals` measures the
    DeepKKT conditions at the end (None where no classifier is involved); `config` is what was run.
    """

    samples: SupportSet
    status: Status
    history: pd.DataFrame
    residuals: Residuals | None
    config: Any

    def __repr__(self) -> str:
        return f"Solution({len(self.samples)} samples, {self.status.name}: {self.status})"
