"""What every solver returns: the samples, what happened, how it went and how good they are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import pandas as pd

from dsvlib.conditions import Residuals
from dsvlib.support_set import SupportSet


class Status(Enum):
    """How a solver ended; the value is a sentence for people."""

    CONVERGED = "The loss stopped changing within the tolerance."
    ALL_STEPS = "All steps were run."
    NON_FINITE = "A loss or gradient became NaN or infinite; the samples are the last finite ones."
    NO_CANDIDATES = "Every candidate's multiplier turned negative; the samples are the last ones."
    OPTIMAL = "The optimality conditions hold within the tolerance; the certificate shows it."
    NOT_OPTIMAL = "The solver stopped before the optimality conditions held; see the certificate."
    NO_GRADIENTS = "The gradients of all samples vanish; every multiplier is zero."

    @property
    def successful(self) -> bool:
        """Whether the samples are what was asked for."""
        return self in (Status.CONVERGED, Status.ALL_STEPS, Status.OPTIMAL)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False)
class Certificate:
    """Proof that λ solves min ½‖θ + Σ λᵢ gᵢ‖² + (ρ/2)‖λ‖², 0 ≤ λ ≤ u, or how far it is from it.

    With gᵢ = ∇_θ Lᵢ and rᵢ = gᵢ·(θ + Σ λⱼ gⱼ) + ρλᵢ the reduced gradient, λ is optimal if and only
    if rᵢ ≥ 0 where λᵢ = 0, rᵢ = 0 where 0 < λᵢ < u, and rᵢ ≤ 0 where λᵢ = u. All of it is without
    units: rᵢ is divided by ‖gᵢ‖‖θ‖ (a cosine), products λᵢrᵢ by ‖θ‖².

    stationarity
        ‖θ + Σ λᵢ gᵢ‖ / ‖θ‖, the primal residual; 0 means that θ is a cone combination of −gᵢ.
    multiplier_min, multiplier_max
        Smallest and largest λ.
    gradient_min
        Smallest rᵢ among λᵢ = 0; ≥ 0 up to rounding. 0 where every λ is active.
    complementarity
        Largest |λᵢ rᵢ| among λᵢ < u.
    violation
        Largest violation of the three conditions on rᵢ.
    gap
        Primal minus dual objective: Σ |λᵢ rᵢ| over λᵢ < u plus Σ max(0, λᵢ rᵢ) over λᵢ = u; the
        true gap once `violation` is 0.
    active, at_bound
        Fractions with λ > 0 and with λ = u.
    rank, condition
        Of the Gram matrix of the gradients scaled to length 1: numerical rank and the ratio of its
        largest to its smallest retained eigenvalue.
    unique
        Whether no other λ is optimal: the gradients with rᵢ = 0 are linearly independent (those
        that vanish left aside).
    tolerance
        What `satisfied` compares with.
    per_sample
        A row per sample: label, multiplier, gradient_norm, contribution (λ‖g‖: large λ on a
        vanishing gradient means little), reduced_gradient.
    """

    stationarity: float
    multiplier_min: float
    multiplier_max: float
    gradient_min: float
    complementarity: float
    violation: float
    gap: float
    active: float
    at_bound: float
    rank: int
    condition: float
    unique: bool
    tolerance: float
    per_sample: pd.DataFrame

    @property
    def satisfied(self) -> bool:
        """Whether λ ≥ 0, the reduced gradients and the duality gap all hold within `tolerance`."""
        return self.multiplier_min >= 0 and max(self.violation, self.gap) <= self.tolerance

    def table(self) -> pd.DataFrame:
        """Return the numbers as a tidy table (quantity, value)."""
        names = [field.name for field in fields(self) if field.name != "per_sample"]
        values = [float(getattr(self, name)) for name in names]
        return pd.DataFrame({"quantity": names, "value": values})


@dataclass(frozen=True, eq=False)
class Solution:
    """Result of `synthesize`, `fit_multipliers`, `match_gradients` and `match_distributions`.

    `history` is tidy, one row per logged step with unweighted loss terms; `residuals` measures the
    DeepKKT conditions at the end (None where no classifier is involved); `config` is what was run.
    `certificate` is there where the solver can prove its answer.
    """

    samples: SupportSet
    status: Status
    history: pd.DataFrame
    residuals: Residuals | None
    config: Any
    certificate: Certificate | None = None

    def __repr__(self) -> str:
        return f"Solution({len(self.samples)} samples, {self.status.name}: {self.status})"
