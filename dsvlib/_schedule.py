"""Learning-rate schedules and when to stop, for training, synthesis and the fit of multipliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["constant", "cosine", "one-cycle", "halfway"]


def learning_rate_factor(schedule: Schedule, fraction: float) -> float:
    """Return the factor on the learning rate after `fraction` ∈ [0, 1] of the steps."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * fraction)) / 2
    if schedule == "one-cycle":
        return fraction / 0.2 if fraction < 0.2 else (1 - fraction) / 0.8
    if schedule == "halfway":
        return 1.0 if fraction < 0.5 else 0.1
    return 1.0


def has_settled(last: Sequence[float], tolerance: float) -> bool:
    """Whether the last two of what is minimised differ by less than this fraction; 0 never."""
    if len(last) < 2:
        return False
    return abs(last[-1] - last[-2]) < tolerance * max(abs(last[-2]), 1e-12)
