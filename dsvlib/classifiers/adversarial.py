"""Adversarial training: learning from images moved against the classifier, within a small ball.

    max over ‖δ‖₂ ≤ r of L(Φ(x + δ; θ), y), x + δ ∈ [0, 1]   (Madry et al. 2018), pixels in [0, 1]

Each image starts uniformly in the ball and takes steps along its normalised gradient. Pictures that
a classifier trained so asks for are closer to what eyes expect (Santurkar et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsvlib._validation import check_count, check_number
from dsvlib.frozen import evaluation_mode
from dsvlib.logits import LossFn


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """How far and how often images are moved: r in [0, 1] pixels, and the steps.

    A step is 1.25 r long, or 2.5 r / steps from the third on, so that the ball can be crossed.
    """

    radius: float = 0.5
    steps: int = 1

    def __post_init__(self) -> None:
        check_number("radius", self.radius, above=0)
        check_count("steps", self.steps)


def attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    config: AdversarialConfig,
    mean: Sequence[float],
    std: Sequence[float],
    loss_fn: LossFn,
    generator: torch.Generator,
) -> Tensor:
    """Return `inputs` [n, C, …], normalised by `mean` and `std`, moved to raise the loss of each.

    The model is read in evaluation mode and left as it was.
    """
    each = (1, -1, *(1,) * (inputs.ndim - 2))  # channels
    offset, scale = (inputs.new_tensor(value).view(each) for value in (mean, std))
    pixels = inputs * scale + offset
    moved = pixels + _uniform_in_ball(inputs, config.radius, generator)
    length = 2.5 * config.radius / max(config.steps, 2)
    with evaluation_mode(model), torch.enable_grad():
        for _ in range(config.steps):
            moved = moved.detach().clamp(0, 1).requires_grad_()
            loss = loss_fn(model((moved - offset) / scale).to(inputs.dtype), labels).sum()
            (slope,) = torch.autograd.grad(loss, moved)
            shift = moved.detach() + length * slope / _norm(slope).clamp(min=1e-12) - pixels
            moved = pixels + shift * (config.radius / _norm(shift).clamp(min=config.radius))
    return (moved.detach().clamp(0, 1) - offset) / scale


def _uniform_in_ball(like: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    direction = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    share = torch.rand(len(like), generator=generator, dtype=like.dtype)
    distance = radius * share ** (1 / like[0].numel())
    distance = distance.view(-1, *(1,) * (like.ndim - 1))
    return (distance * direction / _norm(direction)).to(like.device)


def _norm(value: Tensor) -> Tensor:
    return value.flatten(1).norm(dim=1).view(-1, *(1,) * (value.ndim - 1))
