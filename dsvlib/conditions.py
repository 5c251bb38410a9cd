"""The DeepKKT conditions of a trained classifier Φ(·; θ) (DSV §4.1).

For candidates (xᵢ, yᵢ, λᵢ) and a loss L with a logistic tail:

    primal feasibility   argmax_c Φ_c(xᵢ; θ) = yᵢ
    dual feasibility     λᵢ ≥ 0
    stationarity         θ = −Σᵢ λᵢ ∇_θ L(Φ(xᵢ; θ), yᵢ)

Complementary slackness is left out, as in the paper. Σᵢ λᵢ ∇_θ Lᵢ is the gradient of one weighted
sum, so it costs one backward pass whatever n is, and no per-sample gradient is ever stored.

Shapes: x [n, C, H, W], y int64 [n] or float [n, K], λ [n], logits [n, K]; θ is a dict of the
parameters that the sum runs over. The model is read in evaluation mode and never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dsvlib._validation import check_choice, check_label_range, check_number, select_params
from dsvlib.distance import DISTANCES, Distance, distance
from dsvlib.frozen import evaluation_mode
from dsvlib.logits import LossFn, cross_entropy, is_feasible
from dsvlib.second_order import cheap_double_backward
from dsvlib.support_set import SupportSet


class Terms(NamedTuple):
    """The two losses of the conditions on one batch, and the logits they came from."""

    stationarity: Tensor
    primal: Tensor
    logits: Tensor


class Conditions:
    """The conditions of one frozen classifier as functions of (x, y, λ), ready for the inner loop.

    θ is flattened once; every call after that is one forward and one backward pass that can be
    differentiated again. Use the functions below unless you write a loop of your own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Mapping[str, Tensor] | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        # detached leaves share the model's memory: nothing is copied and no .grad is touched
        self.theta = {
            name: value.detach().requires_grad_()
            for name, value in select_params(model, params).items()
        }
        self.model = model
        self.loss_fn = loss_fn or cross_entropy
        self._checked: Tensor | None = None  # labels already found in range, in the inner loop
        self.flat_theta = flatten(self.theta).detach()

    def _forward(self, inputs: Tensor) -> Tensor:
        theta = self.flat_theta
        if inputs.dtype != theta.dtype or inputs.device != theta.device:
            raise ValueError(
                f"inputs: expected {theta.dtype} on {theta.device} as the model's parameters, got "
                f"{inputs.dtype} on {inputs.device}; move one to the other with .to(…)"
            )
        try:
            with cheap_double_backward():
                logits: Tensor = functional_call(self.model, self.theta, (inputs,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"inputs: expected a shape that the model can read, got {list(inputs.shape)}; "
                f"compare it with the model's input shape (PyTorch says: {error})"
            ) from error
        return logits

    def losses(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample [n] and the logits [n, K]."""
        logits = self._forward(inputs)
        if logits.ndim != 2 or len(logits) != len(inputs):
            raise ValueError(
                f"model: expected logits [n, K] for {len(inputs)} inputs, got shape "
                f"{list(logits.shape)}; wrap the model so that it returns one row per sample"
            )
        # a loss of one's own may code labels as it likes; labels are checked once, not every step
        if self.loss_fn is cross_entropy and labels is not self._checked:
            check_label_range(labels, logits.shape[1])
            self._checked = labels
        losses = self.loss_fn(logits, labels)
        if losses.shape != (len(inputs),):
            raise ValueError(
                f"loss_fn: expected one loss per sample, shape [{len(inputs)}], got "
                f"{list(losses.shape)}; leave out the reduction (reduction='none')"
            )
        return losses, logits

    def gradient(
        self, losses: Tensor, multipliers: Tensor, *, differentiable: bool = True
    ) -> tuple[Tensor, ...]:
        """Return Σᵢ λᵢ ∇_θ Lᵢ, one tensor per parameter, from the losses of one forward pass."""
        if multipliers.dtype != losses.dtype or multipliers.device != losses.device:
            raise ValueError(
                f"multipliers: expected {losses.dtype} on {losses.device} as the losses, got "
                f"{multipliers.dtype} on {multipliers.device}; move one to the other with .to(…)"
            )
        return torch.autograd.grad(
            torch.dot(multipliers, losses),
            list(self.theta.values()),
            create_graph=differentiable,
            materialize_grads=True,  # a parameter that the output ignores has gradient zero
        )

    def terms(self, inputs: Tensor, labels: Tensor, multipliers: Tensor, kind: Distance) -> Terms:
        """Return L_stat = D(θ, −Σλ∇L) and L_primal from one forward pass.

        L_primal = (1/n) Σᵢ Lᵢ·[Φ(xᵢ) is not classified as yᵢ], the paper's hinge-like switch.
        """
        losses, logits = self.losses(inputs, labels)
        gradient = torch.cat([part.reshape(-1) for part in self.gradient(losses, multipliers)])
        return Terms(
            stationarity=distance(self.flat_theta, gradient, kind),
            primal=primal_loss(losses, logits, labels),
            logits=logits,
        )


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the tensors as one vector [P], in their order."""
    return torch.cat([value.reshape(-1) for value in tensors.values()])


def primal_loss(losses: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return (1/n) Σ Lᵢ over the samples that are not classified as labelled, a scalar."""
    return torch.where(is_feasible(logits, labels), 0.0, losses).mean()


def weighted_gradient(
    model: nn.Module,
    samples: SupportSet,
    *,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
) -> dict[str, Tensor]:
    """Return Σᵢ λᵢ ∇_θ L(Φ(xᵢ; θ), yᵢ) by parameter name (DSV §4.1, stationarity).

    Differentiable in `samples.inputs` and `samples.multipliers` where they require grad.

    Parameters
    ----------
    model
        Any classifier [n, …] → [n, K]; read in evaluation mode, left as it was.
    samples
        The candidates.
    params
        The parameters θ to differentiate by (a subset of ``dict(model.named_parameters())``);
        default: all that require grad.
    loss_fn
        ``loss_fn(logits, labels) -> [n]``, one loss per sample without reduction, so that a mean
        cannot rescale λ. Default: cross-entropy.

    Raises ValueError for labels out of range, a loss that was reduced, unknown parameter names or
    a model without parameters that require grad.
    """
    conditions = Conditions(model, params=params, loss_fn=loss_fn)
    wanted = samples.inputs.requires_grad or samples.multipliers.requires_grad
    differentiable = torch.is_grad_enabled() and wanted
    with evaluation_mode(model), torch.enable_grad():
        losses, _ = conditions.losses(samples.inputs, samples.labels)
        gradient = conditions.gradient(losses, samples.multipliers, differentiable=differentiable)
    return dict(zip(conditions.theta, gradient, strict=True))


def deepkkt_loss(
    model: nn.Module,
    samples: SupportSet,
    *,
    params: Mapping[str, Tensor] | None = None,
    distance: Distance = "cosine",
    primal_weight: float = 1.0,
) -> Tensor:
    """Return L_kkt = β1·L_primal + D(θ, −Σᵢ λᵢ ∇_θ Lᵢ), a scalar (DSV Eq. 9, its first two terms).

    Differentiable in `samples.inputs` and `samples.multipliers`; the model is left as it was.

    Parameters
    ----------
    params
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
        terms = Conditions(model, params=params).terms(
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
    check_number("batch_size", batch_size, at_least=1)
    conditions = Conditions(model, params=params, loss_fn=loss_fn)
    total = [torch.zeros_like(value) for value in conditions.theta.values()]
    feasible = 0
    with evaluation_mode(model), torch.enable_grad():
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            losses, logits = conditions.losses(batch.inputs.detach(), batch.labels)
            parts = conditions.gradient(losses, batch.multipliers.detach(), differentiable=False)
            torch._foreach_add_(total, parts)
            feasible += int(is_feasible(logits, batch.labels).sum())
    theta = [value.detach() for value in conditions.theta.values()]
    flat = torch.cat([part.reshape(-1) for part in total])
    rows = [
        (name, *_compare(own, part))
        for name, own, part in zip(conditions.theta, theta, total, strict=True)
    ]
    stationarity, cosine = _compare(conditions.flat_theta, flat)
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
    scale = norm * gradient.norm()
    cosine = float(-(theta * gradient).sum() / scale) if scale > 0 else float("nan")
    return relative, cosine
