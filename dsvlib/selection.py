"""Small sets chosen from a labelled one: by λ, at random, by geometry or by training history.

All but `select` read a data set, split, or any torch Dataset of (x, y), and return, per class in
order, `per_class` samples with λ = 1; `select` reads samples that hold λ. Figures for them are the
controls of DSV Table 1.

Shapes: inputs [n, …], hard labels int64 [n], features [n, d]; results [K·per_class, …], one class
after the other. Every class from 0 to the largest label (or of the class names) must be there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsvlib._validation import (
    as_generator,
    as_labels,
    check_count,
    check_finite,
    check_inputs,
    check_same_length,
)
from dsvlib.classifiers.architectures import embed
from dsvlib.data.datasets import AnySplit, Dataset, as_split
from dsvlib.frozen import device_of, evaluation_mode
from dsvlib.support_set import SupportSet


def select(samples: SupportSet, per_class: int) -> SupportSet:
    """Return the samples with the largest λ of each class, largest first (DSV §4.2, Table 1).

    Equal λ keep the order of `samples`. Raises ValueError where a class is missing or has fewer
    than `per_class` samples; soft labels count as their most probable class.
    """
    order = torch.argsort(samples.multipliers.detach(), descending=True, stable=True)
    groups = _groups(samples.hard_labels[order], per_class, _class_count(samples))
    return samples[torch.cat([order[group[:per_class]] for group in groups])]


def random_subset(
    split: AnySplit | Dataset, per_class: int, *, generator: torch.Generator | None = None
) -> SupportSet:
    """Return `per_class` samples of each class, drawn without replacement.

    `generator` is a CPU generator (default: a fresh one with seed 0). Raises as `select` does.
    """
    generator = as_generator(generator)

    def draw(group: Tensor) -> Tensor:
        return torch.randperm(len(group), generator=generator)[:per_class].to(group.device)

    return _choose(_as_set(split), per_class, draw)


def class_means(
    split: AnySplit | Dataset, per_class: int = 1, *, generator: torch.Generator | None = None
) -> SupportSet:
    """Return the mean image of each class.

    With `per_class` > 1 the class is dealt into that many parts of (nearly) equal size and the mean
    of each is taken: in the order of the samples, or shuffled by `generator`. Raises as `select`.
    """
    samples = _as_set(split)
    means, labels = [], []
    for label, group in enumerate(_groups(samples.labels, per_class, _class_count(samples))):
        if generator is not None:
            draw = as_generator(generator)
            group = group[torch.randperm(len(group), generator=draw).to(group.device)]
        means += [samples.inputs[group[part::per_class]].mean(dim=0) for part in range(per_class)]
        labels += [label] * per_class
    return dataclasses.replace(
        samples,
        inputs=torch.stack(means),
        labels=torch.tensor(labels, device=samples.labels.device),
        multipliers=torch.ones(len(labels)).to(samples.inputs),
    )


def herding(
    split: AnySplit | Dataset,
    per_class: int,
    *,
    features: Tensor | None = None,
    model: nn.Module | None = None,
) -> SupportSet:
    """Return samples whose running mean stays closest to the class mean (Welling 2009).

    Greedily and without replacement, step t takes argmin_j ‖μ − (S + φ_j)/(t + 1)‖, where S is the
    sum of the t features φ taken so far and μ the mean of the class.

    Parameters
    ----------
    features
        φ, float [n, d] for the n samples of the split.
    model
        Where `features` is None: φ is what the model's last linear layer sees. Where both are
        None, φ is the pixels.

    Raises ValueError as `select` does, or for features that do not fit.
    """
    samples = _as_set(split)
    space = _features(samples, features, model)

    def herd(group: Tensor) -> Tensor:
        points = space[group]
        mean = points.mean(dim=0)
        total = torch.zeros_like(mean)
        taken = torch.zeros(len(group), dtype=torch.bool, device=points.device)
        chosen = []
        for step in range(1, per_class + 1):
            # ‖μ − (S + φ)/t‖ is ‖tμ − S − φ‖ / t
            far = (step * mean - total - points).square().sum(dim=1)
            best = far.masked_fill(taken, torch.inf).argmin()
            total = total + points[best]
            taken[best] = True
            chosen.append(best)
        return torch.stack(chosen)

    return _choose(samples, per_class, herd)


def k_center(
    split: AnySplit | Dataset,
    per_class: int,
    *,
    features: Tensor | None = None,
    model: nn.Module | None = None,
) -> SupportSet:
    """Return samples that cover each class: the one nearest the mean, then the farthest ones first.

    Each further sample is the one with the largest distance to those chosen (Gonzalez 1985), at
    most twice as far as the best cover. Parameters and errors as for `herding`.
    """
    samples = _as_set(split)
    space = _features(samples, features, model)

    def cover(group: Tensor) -> Tensor:
        points = space[group]
        chosen = [(points - points.mean(dim=0)).square().sum(dim=1).argmin()]
        nearest = torch.full((len(group),), torch.inf).to(points)
        while len(chosen) < per_class:
            nearest = nearest.minimum((points - points[chosen[-1]]).square().sum(dim=1))
            nearest[chosen[-1]] = -1  # a duplicate has distance 0 and may follow, itself never
            chosen.append(nearest.argmax())
        return torch.stack(chosen)

    return _choose(samples, per_class, cover)


def forgetting(split: AnySplit | Dataset, per_class: int, *, hits: Tensor) -> SupportSet:
    """Return the most forgettable samples of each class (Toneva et al. 2019).

    `hits` [T, n] says in which of T epochs each sample was classified right; `HitRecorder` takes it
    down. Equal counts keep the order of the samples. Raises ValueError as `select` does, or where
    `hits` does not fit.
    """
    samples = _as_set(split)
    events = forgetting_events(hits)
    check_same_length(inputs=len(samples), hits=len(events))
    events = events.to(samples.labels.device)

    def most(group: Tensor) -> Tensor:
        return torch.argsort(events[group], descending=True, stable=True)[:per_class]

    return _choose(samples, per_class, most)


def forgetting_events(hits: Tensor) -> Tensor:
    """Return how often each sample went from right to wrong, int64 [n], from `hits` bool [T, n].

    A sample that was never right counts T, more than any other can reach.
    """
    if hits.ndim != 2 or hits.dtype != torch.bool or not len(hits):
        raise ValueError(
            f"hits: expected bool [T, n] with a row per epoch, got {hits.dtype} "
            f"{list(hits.shape)}; pass HitRecorder(n).hits after training"
        )
    events = (hits[:-1] & ~hits[1:]).sum(dim=0)
    return torch.where(hits.any(dim=0), events, len(hits))


class HitRecorder:
    """Takes down which samples were classified right in each epoch: pass it to `train`.

    >>> recorder = HitRecorder(len(split))
    >>> train(model, split, on_batch=recorder)
    >>> forgetting(split, 10, hits=recorder.hits)
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._epochs: list[Tensor] = []
        self._seen = count  # samples seen in the current epoch; a full one starts the next

    def __call__(self, indices: Tensor, hits: Tensor) -> None:
        """Note one batch: sample numbers [b] and which of them were right, [b]."""
        if self._seen >= self.count:
            self._epochs.append(torch.zeros(self.count, dtype=torch.bool))
            self._seen = 0
        self._epochs[-1][indices.cpu()] = hits.bool().cpu()
        self._seen += len(indices)

    @property
    def hits(self) -> Tensor:
        """Bool [T, n]; T is the number of epochs seen."""
        if not self._epochs:
            return torch.zeros(0, self.count, dtype=torch.bool)
        return torch.stack(self._epochs)


def _as_set(split: AnySplit | Dataset) -> SupportSet:
    """Return the samples of a split, or of a data set's training part, with hard labels and λ = 1.

    A data set passes on its class names and normalisation, and so does a `SupportSet`.
    """
    part = split.train if isinstance(split, Dataset) else as_split(split)
    inputs, labels = check_inputs(part.inputs), as_labels(part.labels)
    check_same_length(inputs=len(inputs), labels=len(labels))
    if labels.is_floating_point():
        labels = labels.argmax(dim=1)
    samples = SupportSet(inputs, labels, torch.ones(len(labels)).to(inputs))
    return samples.describe(split) if isinstance(split, Dataset | SupportSet) else samples


def _choose(samples: SupportSet, per_class: int, choose: Callable[[Tensor], Tensor]) -> SupportSet:
    """Return the samples that `choose` picks from the sample numbers of each class."""
    groups = _groups(samples.labels, per_class, _class_count(samples))
    return samples[torch.cat([group[choose(group)] for group in groups])]


def _class_count(samples: SupportSet) -> int:
    if samples.labels.is_floating_point():
        return int(samples.labels.shape[1])
    return max(len(samples.classes), int(samples.labels.max()) + 1)


def _groups(labels: Tensor, per_class: int, classes: int) -> list[Tensor]:
    """Return the sample numbers of each class, in order, at least `per_class` of each."""
    check_count("per_class", per_class)
    if int(labels.min()) < 0:
        raise ValueError(
            f"labels: expected class numbers ≥ 0, got {int(labels.min())}; number classes from 0"
        )
    counts = torch.bincount(labels, minlength=classes)
    fewest = int(counts.argmin())
    if counts[fewest] < per_class:
        have = int(counts[fewest])
        raise ValueError(
            f"per_class: expected at least {per_class} samples of every class, got "
            f"{have or 'none'} of class {fewest}; "
            + ("add the missing class" if not have else f"ask for at most {have} per class")
        )
    return [torch.nonzero(labels == label)[:, 0] for label in range(classes)]


def _features(samples: SupportSet, features: Tensor | None, model: nn.Module | None) -> Tensor:
    """Return φ [n, d]: as given, as the model's last linear layer sees it, or the pixels."""
    if features is not None and model is not None:
        raise ValueError(
            "features: expected features or a model to compute them, got both; leave one out"
        )
    if features is not None:
        check_finite("features", features)
        if features.ndim != 2 or len(features) != len(samples):
            raise ValueError(
                f"features: expected shape [n, d] with n = {len(samples)} samples, got "
                f"{list(features.shape)}; one row per sample, flattened"
            )
        return features.detach().to(samples.inputs.device)
    if model is None:
        return samples.inputs.detach().flatten(1)
    device = device_of(model)
    with evaluation_mode(model), torch.no_grad():
        parts = [embed(model, batch.to(device)) for batch in samples.inputs.split(500)]
    return torch.cat(parts).to(samples.inputs.device)
