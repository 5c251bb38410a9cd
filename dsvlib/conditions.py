"""The DeepKKT conditions of a trained classifier Φ(·; θ), and every term of Eq. 9 (DSV §4).

For candidates (xᵢ, yᵢ, λᵢ) and a loss L with a logistic tail:

    primal feasibility   argmax_c Φ_c(xᵢ; θ) = yᵢ
    dual feasibility     λᵢ ≥ 0
    stationarity         θ = −Σᵢ λᵢ ∇_θ L(Φ(xᵢ; θ), yᵢ)
    manifold             x ∈ M, for which augmentation and the priors below stand

    Eq. 9   L_total(X) = L_kkt(X) + η·L_kkt(A(X)) + β2·L_tv(X) + β3·L_norm(X)
            L_kkt      = β1·L_primal + L_stat,   L_stat = D(θ, −Σᵢ λᵢ ∇_θ Lᵢ)

Complementary slackness is left out, as in the paper. `synthesis` minimises L_total, `multipliers`
L_stat over λ.

Shapes: x [n, C, H, W], y int64 [n] or float [n, K], λ [n], logits [n, K]; θ and g = Σᵢ λᵢ ∇_θ Lᵢ
are flat, [P]. The model is read in evaluation mode and never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvlib._validation import check_choice, check_count, check_inputs, check_number
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import FrozenClassifier, flatten
from dsvlib.logits import LossFn, is_feasible
from dsvlib.support_set import SupportSet

Distance = Literal["cosine", "l1", "l2"]
DISTANCES: tuple[str, ...] = get_args(Distance)


def distance(theta: Tensor, gradient: Tensor, kind: Distance) -> Tensor:
    """Return D(θ, −g), a scalar: how far from stationarity the candidates are.

    ``"l1"``: (1/P) Σ |θ + g|, the paper's; ``"l2"``: (1/P) Σ (θ + g)², its Algorithm 1; neither
    moves on a classifier that is not close to stationary. ``"cosine"``: 1 − cos(θ, −g), which does,
    and is 1 (without a gradient) where g vanishes.
    """
    if kind == "l1":
        return (theta + gradient).abs().mean()
    if kind == "l2":
        return (theta + gradient).square().mean()
    return 1 - _cosine(theta, -gradient)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return cos(a, b), 0 where one of them vanishes.

    Gradients of confident samples reach 1e-30, whose squares are 0 in float32: each vector is taken
    in units of its own largest entry.
    """
    units = [v.detach().abs().max() for v in (first, second)]
    scaled = [
        v / torch.where(unit > 0, unit, 1.0) for v, unit in zip((first, second), units, strict=True)
    ]
    return F.cosine_similarity(*scaled, dim=0, eps=torch.finfo(first.dtype).tiny)


def best_scale(theta: Tensor, gradient: Tensor) -> float:
    """Return the a that minimises ‖θ + a·g‖₂ (0 where g vanishes).

    The cosine is blind to the scale of λ; this one fits θ best.
    """
    unit = float(gradient.abs().max())
    if not unit > 0:
        return 0.0
    scaled = gradient / unit
    return -float(theta @ scaled) / float(scaled.square().sum()) / unit


def primal_loss(losses: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return L_primal = (1/n) Σ Lᵢ·[xᵢ is not classified as yᵢ], the paper's hinge-like switch."""
    return torch.where(is_feasible(logits, labels), 0.0, losses).mean()


def total_variation(inputs: Tensor) -> Tensor:
    """Return L_tv: the anisotropic total variation of each image, over channels and pixels, [n].

    TV(x) = Σ |x[c, r+1, s] − x[c, r, s]| + Σ |x[c, r, s+1] − x[c, r, s]|; a constant image has 0.
    Raises ValueError unless `inputs` is [n, C, H, W].
    """
    check_inputs(inputs)
    if inputs.ndim != 4:
        raise ValueError(
            f"inputs: expected images [n, C, H, W], got shape {list(inputs.shape)}; "
            f"total variation is defined on pixels only"
        )
    return image_variation(inputs)


def image_variation(inputs: Tensor) -> Tensor:
    """Compute `total_variation` without its checks, for the inner loop."""
    rows = inputs.diff(dim=2).abs().sum(dim=(1, 2, 3))
    columns = inputs.diff(dim=3).abs().sum(dim=(1, 2, 3))
    return rows + columns


def squared_norm(inputs: Tensor, target: float = 0.0) -> Tensor:
    """Return L_norm: the mean squared distance of the pixels from `target`, [n]."""
    return (inputs - target).flatten(1).square().mean(dim=1)


class Terms(NamedTuple):
    """The two losses of the conditions on one batch, and the logits they came from."""

    stationarity: Tensor
    primal: Tensor
    logits: Tensor


class Conditions(FrozenClassifier):
    """The conditions of one frozen classifier as functions of (x, y, λ), ready for the inner loop.

    Use the functions below unless you write a loop of your own.
    """

    def terms(self, inputs: Tensor, labels: Tensor, multipliers: Tensor, kind: Distance) -> Terms:
        """Return L_stat and L_primal from one forward pass."""
        losses, logits = self.losses(inputs, labels)
        gradient = flatten(self.gradient(losses, multipliers))
        return Terms(
            stationarity=distance(self.flat_theta, gradient, kind),
            primal=primal_loss(losses, logits, labels),
            logits=logits,
        )

    def best_scaled(self, inputs: Tensor, labels: Tensor, multipliers: Tensor) -> Tensor:
        """Return λ at the scale that fits θ best, which the cosine leaves open; 0 if none does."""
        losses, _ = self.losses(inputs.detach(), labels)
        gradient = self.gradient(losses, multipliers.detach(), differentiable=False)
        return multipliers.detach() * max(0.0, best_scale(self.flat_theta, flatten(gradient)))


def deepkkt_loss(
    model: nn.Module,
    samples: SupportSet,
    *,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    distance: Distance = "cosine",
    primal_weight: float = 1.0,
) -> Tensor:
    """Return L_kkt = β1·L_primal + D(θ, −Σᵢ λᵢ ∇_θ Lᵢ), a scalar.

    Differentiable in `samples.inputs` and `samples.multipliers`; the model is left as it was.

    Parameters
    ----------
    params, loss_fn
        As in `weighted_gradient`.
    distance
        ``"cosine"``, ``"l1"`` (averaged per parameter) or ``"l2"`` (squared, averaged).
    primal_weight
        β1 ≥ 0.

    Raises ValueError as `weighted_gradient` does, or for an unknown distance.
    """
    check_choice("distance", distance, DISTANCES)
    check_number("primal_weight", primal_weight, at_least=0)
    with evaluation_mode(model), torch.enable_grad():
        terms = Conditions(model, params=params, loss_fn=loss_fn).terms(
            samples.inputs, samples.labels, samples.multipliers, distance
        )
        return primal_weight * terms.primal + terms.stationarity


@dataclass(frozen=True)
class Residuals:
    """How far candidates are from meeting each condition; 0 everywhere is a perfect solution.

    `stationarity` is ‖θ + Σλ∇L‖₂ / ‖θ‖₂, `cosine` that of θ and −Σλ∇L (1 is best), `primal` the
    fraction not classified as labelled, `dual` the most negative λ (0 if none), `active` the
    fraction with λ > 0. `per_layer` has a row per parameter tensor with its own stationarity and
    cosine.
    """

    stationarity: float
    cosine: float
    primal: float
    dual: float
    active: float
    per_layer: pd.DataFrame


def residuals(
    model: nn.Module,
    samples: SupportSet,
    *,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    batch_size: int = 1000,
) -> Residuals:
    """Measure the DeepKKT conditions, streaming over batches so that memory stays flat.

    Parameters as in `weighted_gradient`; `batch_size` bounds memory and changes nothing else.
    """
    check_count("batch_size", batch_size)
    classifier = FrozenClassifier(model, params=params, loss_fn=loss_fn)
    total = [torch.zeros_like(value) for value in classifier.theta.values()]
    feasible = 0
    with evaluation_mode(model), torch.enable_grad():
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            losses, logits = classifier.losses(batch.inputs.detach(), batch.labels)
            parts = classifier.gradient(losses, batch.multipliers.detach(), differentiable=False)
            torch._foreach_add_(total, parts)
            feasible += int(is_feasible(logits, batch.labels).sum())
    rows = [
        (name, *_compare(own.detach(), part))
        for (name, own), part in zip(classifier.theta.items(), total, strict=True)
    ]
    stationarity, cosine = _compare(classifier.flat_theta, flatten(total))
    return Residuals(
        stationarity=stationarity,
        cosine=cosine,
        primal=1 - feasible / len(samples),
        dual=min(0.0, float(samples.multipliers.detach().min())),
        active=float((samples.multipliers > 0).float().mean()),
        per_layer=pd.DataFrame(rows, columns=["parameter", "stationarity", "cosine"]),
    )


def _compare(theta: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Return ‖θ + g‖ / ‖θ‖ and cos(θ, −g) of one tensor; NaN where θ or g is zero throughout."""
    norm = theta.norm()
    relative = float((theta + gradient).norm() / norm) if norm > 0 else float("nan")
    cosine = float(_cosine(theta.flatten(), -gradient.flatten()))
    return relative, cosine if theta.any() and gradient.any() else float("nan")
