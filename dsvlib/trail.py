"""Small problems in the open: the gradients as a matrix, and every λ on the way to a fit.

`fit_multipliers` streams over batches and keeps the last λ only. Where G [n, P] fits into memory,
the same steps cost two products with G each, and the whole path of λ can be kept and looked at:

    D(θ, −Gᵀλ),    ∂D/∂λ = G·∂D/∂g at g = Gᵀλ

Shapes: gᵢ = ∇_θ L(Φ(xᵢ; θ), yᵢ) is row i of G [n, P]; θ [P]; a path of λ is [steps + 1, n].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dsvlib._schedule import learning_rate_factor
from dsvlib._validation import check_finite, check_number, check_same_length
from dsvlib.distance import distance
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import SampleGradients
from dsvlib.logits import LossFn
from dsvlib.multipliers import GradientConfig


def per_sample_gradients(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | Sequence[int],
    *,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return the gradients gᵢ as a matrix [n, P] and θ [P], on the model's device.

    Parameters as in `fit_multipliers`; memory is 4nP bytes in float32. The model is left as it was.
    Raises ValueError for shapes or labels that do not fit, or gradients that are not finite.
    """
    check_number("batch_size", batch_size, at_least=1)
    samples = SampleGradients(
        model, inputs, labels, params=params, loss_fn=loss_fn, batch_size=batch_size
    )
    with evaluation_mode(model):
        samples.logits()  # labels and losses are checked here
        rows = samples.theta.new_empty(len(samples), len(samples.theta))
        gradients = samples.fill(rows, 0)
    check_finite("gradients of the samples", gradients)
    return gradients, samples.theta


def multiplier_trail(
    gradients: Tensor,
    theta: Tensor,
    *,
    config: GradientConfig | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return λ after every step of the paper's fit, [steps + 1, n], and D there, [steps + 1].

    The same steps as ``fit_multipliers(method="gradient")`` takes with this `config`, except that
    nothing is rescaled at the end (the cosine does not see the scale of λ). `batch_size`,
    `tolerance` and `log_every` play no part. A sample that ``"remove"`` took out stays at 0.
    """
    config = config or GradientConfig()
    generator = generator or torch.Generator().manual_seed(0)
    check_same_length(columns=gradients.shape[1], theta=len(theta))
    total = gradients.sum(dim=0)
    square = float(total.square().sum())
    unit = -float(theta @ total) / square if square > 0 else 1.0
    unit = unit if unit > 0 else 1.0  # as fit_multipliers: no equal multiplier helps
    scaled = torch.ones(len(gradients))
    if config.start == "random":
        scaled = 2 * torch.rand(len(gradients), generator=generator)
    scaled = scaled.to(theta)
    kept = torch.ones_like(scaled, dtype=torch.bool)
    optimizer = torch.optim.Adam([scaled], lr=config.learning_rate, eps=1e-20)
    path, distances = [], []
    for step in range(config.steps + 1):
        sum_of_gradients = (gradients.T @ (unit * scaled)).requires_grad_()
        with torch.enable_grad():
            value = distance(theta, sum_of_gradients, config.distance)
            (direction,) = torch.autograd.grad(value, sum_of_gradients)
        path.append(unit * scaled)
        distances.append(value.detach())
        if step == config.steps or not bool(kept.any()):
            break
        scaled.grad = unit * (gradients @ direction) * kept
        factor = learning_rate_factor(config.schedule, step / config.steps)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        optimizer.step()
        if config.negative_multiplier == "remove":
            kept &= scaled >= 0
            scaled *= kept
        scaled.clamp_(min=0)
    return torch.stack(path), torch.stack(distances)
