"""DM, DC and DSA against the papers' loops written out plainly (`benchmarks/`), for one draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference_distillation import KINDS, Siamese, convnet, dc_loss, dm_loss
from torch import Tensor, nn

from dsvlib import build_model
from dsvlib.augmentation import DSA, Draw
from dsvlib.data.datasets import Split
from dsvlib.distillation import (
    DistributionMatchingConfig,
    GradientMatchingConfig,
    _matching,
    match_distributions,
    match_gradients,
)

CLASSES, SHAPE = 3, (3, 16, 16)


def as_draw(augmentations: list[Siamese]) -> Draw:
    """Return the same numbers as `dsvlib.augmentation` writes them, a row per class."""
    kind = augmentations[0].kind
    u, v, w = torch.tensor([a.numbers for a in augmentations], dtype=torch.float64).T
    if kind == "colour":
        return Draw(None, *(x.view(-1, 1, 1, 1) for x in (u - 0.5, 2 * v, w + 0.5)))
    if kind == "cutout":
        side = torch.arange(16)
        far = [
            (side < c - 4) | (side >= c + 4) for c in (torch.stack([u, v]) * 16).floor()[..., None]
        ]
        return Draw(keep=(far[0][:, None, :, None] | far[1][:, None, None, :]).double())
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(u), 1, 1)
    if kind == "crop":
        down, right = ((2 * t - 1).mul(2).round() for t in (u, v))
        matrix[:, 0, 2], matrix[:, 1, 2] = right / 8, down / 8
    elif kind == "flip":
        matrix[:, 0, 0] = torch.where(u < 0.5, -1.0, 1.0)
    elif kind == "scale":
        matrix[:, 0, 0], matrix[:, 1, 1] = (1 / 1.2 + t * (1.2 - 1 / 1.2) for t in (u, v))
    else:
        angle = (2 * u - 1) * math.radians(15)
        matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
        matrix[:, 1, 0] = angle.sin()
        matrix[:, 0, 1] = -angle.sin()
    return Draw(matrix)


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("method", ["dm", "dc"])
@pytest.mark.parametrize("per_class", [1, 3])
def test_loss_and_gradient_are_those_of_the_plain_loop(
    method: str, per_class: int, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    # so many that a class is read in two parts
    images = torch.randn(CLASSES, 140, *SHAPE, dtype=torch.float64, generator=generator)
    labels = torch.arange(CLASSES).repeat_interleave(140)
    numbers = torch.rand(CLASSES, 3, generator=generator).tolist()
    augmentations: Any = [Siamese(kind or "", tuple(row)) for row in numbers]
    if kind is None:
        augmentations = [lambda x: x] * CLASSES
    else:
        monkeypatch.setattr(_matching, "draw", lambda *args, **kwargs: as_draw(augmentations))
    weights = convnet(CLASSES, SHAPE, width=8, depth=2).state_dict()

    def build() -> nn.Module:
        network = build_model("convnet", num_classes=CLASSES, shape=SHAPE, width=8, depth=2)
        network.load_state_dict(weights)
        return network

    common: Any = {
        "steps": 1,
        "learning_rate": 1.0,
        "momentum": 0.0,
        "init": "real",
        "augmentation": None if kind is None else DSA,
    }
    arguments: Any = {"per_class": per_class, "build_model": build}
    split = Split(images.flatten(0, 1), labels)
    if method == "dm":
        solution = match_distributions(
            split, config=DistributionMatchingConfig(**common), **arguments
        )
    else:
        config = GradientMatchingConfig(**common, loops=(1, 1))
        solution = match_gradients(split, config=config, **arguments)

    network = convnet(CLASSES, SHAPE, width=8, depth=2).double()
    network.load_state_dict(weights)
    start = images[:, :per_class].clone().requires_grad_()
    loss = {"dm": dm_loss, "dc": dc_loss}[method](network, list(images), start, augmentations)
    (expected,) = torch.autograd.grad(loss, start)
    assert solution.history.matching.item() == pytest.approx(loss.item(), rel=1e-6)
    found: Tensor = start.detach().flatten(0, 1) - solution.samples.inputs  # one step at rate 1
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-5, atol=1e-9)


def test_the_plain_draws_are_those_of_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [Siamese.drawn(generator) for _ in range(60)]
    assert {augment.kind for augment in drawn} == set(KINDS)
    image = torch.randn(2, 3, 16, 16, generator=generator)
    assert all(augment(image).shape == image.shape for augment in drawn)
