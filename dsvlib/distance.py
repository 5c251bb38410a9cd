"""D(θ, −g): how far the parameters are from minus the weighted gradient (DSV §4.1, stationarity).

The paper averages ℓ1 over the parameters, its Algorithm 1 prints squared ℓ2, and neither moves on
a classifier that is not close to stationary; the cosine does. All three are offered.
Shapes: θ and g are flat, [P].
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Literal["cosine", "l1", "l2"]
DISTANCES: tuple[str, ...] = get_args(Distance)


def distance(theta: Tensor, gradient: Tensor, kind: Distance) -> Tensor:
    """Return D(θ, −g), a scalar.

    ``"l1"``: (1/P) Σ |θ + g|; ``"l2"``: (1/P) Σ (θ + g)²; ``"cosine"``: 1 − cos(θ, −g), which is 1
    (and has no gradient) where g vanishes.
    """
    if kind == "l1":
        return (theta + gradient).abs().mean()
    if kind == "l2":
        return (theta + gradient).square().mean()
    # gradients of confident samples are tiny: only a true zero may be rounded up
    return 1 - F.cosine_similarity(theta, -gradient, dim=0, eps=torch.finfo(theta.dtype).tiny)


def best_scale(theta: Tensor, gradient: Tensor) -> float:
    """Return the a that minimises ‖θ + a·g‖₂ (0 where g vanishes).

    The cosine is blind to the scale of λ; this one fits θ best.
    """
    square = float(gradient.square().sum())
    return -float(theta @ gradient) / square if square > 0 else 0.0
