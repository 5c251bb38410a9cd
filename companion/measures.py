"""Measures of images that several notebooks take.

Shapes: images [n, C, H, W], class probabilities [n, K], one measure per image [n].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.blind_test import wilson
from companion.trials import seeded
from dsvlib.classifiers.training import logits_of
from dsvlib.data.datasets import AnySplit, as_split


def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Return class probabilities [n, K] in double precision, on the CPU."""
    return logits_of(model, images).double().softmax(dim=1).cpu()


def read_as(
    cases: Iterable[tuple[Any, Tensor]], models: Mapping[str, nn.Module], targets: Tensor
) -> tuple[pd.DataFrame, dict[tuple[Any, str], np.ndarray]]:
    """Ask every model which images it reads as their targets [n].

    Returns a frame with a row per case and model, ``case``, ``reader`` and ``rate`` (%) with the
    95 % interval ``low``, ``high`` (Wilson's, which stays within 0 and 100), and the single answers
    [n] by case and model.
    """
    rows, hits = [], {}
    for case, images in cases:
        for reader, model in models.items():
            hit = (probabilities(model, images).argmax(dim=1) == targets).numpy()
            rows.append((case, reader, 100 * hit.mean(), *wilson(int(hit.sum()), len(hit))))
            hits[case, reader] = hit
    return pd.DataFrame(rows, columns=["case", "reader", "rate", "low", "high"]), hits


def ssim(first: Tensor, second: Tensor, side: int = 7) -> Tensor:
    """Return the mean structural similarity of images in [0, 1], [n].

    From means, variances and the covariance in windows of `side` × `side` pixels; 1 where the
    images are equal.
    """

    def mean(z: Tensor) -> Tensor:
        return F.avg_pool2d(z, side, stride=1)

    mu, nu = mean(first), mean(second)
    covariance = mean(first * second) - mu * nu
    variances = mean(first**2) - mu**2 + mean(second**2) - nu**2
    steady = (0.01**2, 0.03**2)  # keeps both quotients finite
    light = (2 * mu * nu + steady[0]) / (mu**2 + nu**2 + steady[0])
    structure = (2 * covariance + steady[1]) / (variances + steady[1])
    return (light * structure).mean(dim=(1, 2, 3))


def nearest_of_class(images: Tensor, classes: Tensor, split: AnySplit) -> Tensor:
    """Return for each image [n, C, H, W] the closest one of `split` of the class [n] asked for."""
    split = as_split(split)
    found = []
    for x, k in zip(images, classes, strict=True):
        rivals = split.inputs[split.labels == k]
        found.append(rivals[(rivals - x).flatten(1).norm(dim=1).argmin()])
    return torch.stack(found)


def draw_of_class(pools: Sequence[Tensor], wanted: Iterable[int], number: int) -> Tensor:
    """Return one image of each wanted class at random; `pools` has the images of each class."""
    wanted = list(wanted)
    at = torch.rand(len(wanted), generator=seeded(number))
    return torch.stack(
        [pools[k][int(u * len(pools[k]))] for k, u in zip(wanted, at.tolist(), strict=True)]
    )


def evenness(paths: Tensor) -> pd.DataFrame:
    """Return how evenly and how straight each path of images [paths, points, ...] is.

    ``jump`` is the mean distance of neighbours and ``off the line`` the mean distance from the
    straight line between the ends, both over the distance of the ends.
    """
    x = paths.flatten(2)
    from_start, chord = x - x[:, :1], x[:, -1:] - x[:, :1]
    length = chord.norm(dim=2).clamp(min=1e-9)  # [paths, 1]
    foot = (from_start * chord).sum(dim=2, keepdim=True) / length[..., None] ** 2 * chord
    moved = {"jump": x.diff(dim=1), "off the line": from_start - foot}
    return pd.DataFrame({k: z.norm(dim=2).mean(dim=1) / length[:, 0] for k, z in moved.items()})
