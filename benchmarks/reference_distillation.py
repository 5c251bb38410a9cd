"""DM and DC/DSA as their papers describe them: one class after the other, in plain PyTorch.

Written from arXiv 2110.04181 (DM), 2006.05929 (DC) and 2102.08259 (DSA) to be compared with: an
oracle for `tests/test_reference_distillation.py` and a yardstick for `test_distillation.py`. It
shares no code with dsvlib. Its network has the parameter names of dsvlib's ConvNet, so that weights
can be carried over.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("colour", "crop", "cutout", "flip", "scale", "rotate")


def convnet(
    classes: int = 10, shape: Sequence[int] = (3, 32, 32), width: int = 128, depth: int = 3
) -> nn.Module:
    channels, height, wide = shape
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width)]
        layers += [nn.ReLU(), nn.AvgPool2d(2)]
        channels = width
    features = width * (height // 2**depth) * (wide // 2**depth)
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*layers, nn.Flatten()), classifier=nn.Linear(features, classes)
        )
    )


class Siamese(NamedTuple):
    """One of DSA's transformations and the numbers in [0, 1) that all images of a class share."""

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def drawn(cls, generator: torch.Generator) -> Siamese:
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
        return cls(kind, tuple(torch.rand(3, generator=generator).tolist()))

    def __call__(self, images: Tensor) -> Tensor:
        u, v, w = self.numbers
        side = images.shape[-1]
        if self.kind == "colour":
            images = images + (u - 0.5)
            grey = images.mean(dim=1, keepdim=True)
            images = grey + 2 * v * (images - grey)
            mean = images.mean(dim=(1, 2, 3), keepdim=True)
            return mean + (w + 0.5) * (images - mean)
        if self.kind == "crop":  # a window of the image inside a border of zeros
            border = side // 8
            down, right = (round((2 * t - 1) * border) for t in (u, v))
            padded = F.pad(images, (border, border, border, border))
            rows = slice(border + down, border + down + side)
            return padded[:, :, rows, border + right : border + right + side]
        if self.kind == "cutout":
            centre, half = (int(u * side), int(v * side)), side // 4
            mask = torch.ones_like(images[:1, :1])
            rows, columns = (slice(max(0, c - half), c + half) for c in centre)
            mask[:, :, rows, columns] = 0
            return images * mask
        if self.kind == "flip":
            return images.flip(-1) if u < 0.5 else images
        if self.kind == "scale":
            x, y = (1 / 1.2 + t * (1.2 - 1 / 1.2) for t in (u, v))
            matrix = [[x, 0.0, 0.0], [0.0, y, 0.0]]
        else:
            angle = (2 * u - 1) * math.radians(15)
            cosine, sine = math.cos(angle), math.sin(angle)
            matrix = [[cosine, -sine, 0.0], [sine, cosine, 0.0]]
        theta = images.new_tensor(matrix).expand(len(images), 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


def unchanged(images: Tensor) -> Tensor:
    return images


Augmentations = Sequence[Callable[[Tensor], Tensor]]


def dm_loss(network: nn.Module, real: Sequence[Tensor], synthetic: Tensor, a: Augmentations):
    """Return the loss of real [b, C, H, W] of each class and synthetic images [K, m, C, H, W]."""
    embed = network.get_submodule("features")
    for parameter in network.parameters():
        parameter.requires_grad = False
    loss = torch.zeros((), dtype=synthetic.dtype)
    for own, few, augment in zip(real, synthetic, a, strict=True):
        target = embed(augment(own)).detach().mean(dim=0)
        loss = loss + ((target - embed(augment(few)).mean(dim=0)) ** 2).sum()
    return loss


def dc_loss(network: nn.Module, real: Sequence[Tensor], synthetic: Tensor, a: Augmentations):
    """Return the loss of real [b, C, H, W] of each class and synthetic images [K, m, C, H, W]."""
    parameters = list(network.parameters())
    loss = torch.zeros((), dtype=synthetic.dtype)
    for number, (own, few, augment) in enumerate(zip(real, synthetic, a, strict=True)):
        target = torch.autograd.grad(_class_loss(network, augment(own), number), parameters)
        found = torch.autograd.grad(
            _class_loss(network, augment(few), number), parameters, create_graph=True
        )
        for one, other in zip(target, found, strict=True):
            if one.ndim > 1:  # each row belongs to one output
                one, other = one.flatten(1), other.flatten(1)
                lengths = (one.norm(dim=1) * other.norm(dim=1)).clamp_min(1e-8)
                loss = loss + (1 - (one * other).sum(dim=1) / lengths).sum()
    return loss


def _class_loss(network: nn.Module, images: Tensor, number: int) -> Tensor:
    return F.cross_entropy(network(images), torch.full((len(images),), number))


def step(
    loss: Callable[[nn.Module, Sequence[Tensor], Tensor, Augmentations], Tensor],
    real: Sequence[Tensor],
    synthetic: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    batch: int,
    augmented: bool,
    generator: torch.Generator,
) -> float:
    """Take one step of the synthetic images on a fresh network; return the loss before it."""
    network = convnet(len(real), real[0].shape[1:])
    batches = [own[torch.randperm(len(own), generator=generator)[:batch]] for own in real]
    a = [Siamese.drawn(generator) if augmented else unchanged for _ in real]
    value = loss(network, batches, synthetic, a)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()
