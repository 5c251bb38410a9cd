"""How much a small set teaches: fresh networks are trained on it and tested on real data.

Two protocols: the field's (SGD 0.01, momentum 0.9, weight decay 5e-4, rate ×0.1 half way; see
Zhao et al. 2021) and the DSV paper's own (Adam 1e-4). Accuracy is always that of the last epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import pandas as pd
import torch
from torch import Tensor, nn

from dsvlib._validation import (
    as_labels,
    check_count,
    check_inputs,
    check_label_range,
    check_same_length,
)
from dsvlib.augmentation import AugmentationConfig
from dsvlib.classifiers.training import TrainConfig, logits_of, train, train_together
from dsvlib.data.datasets import AnySplit, as_split
from dsvlib.frozen import device_of
from dsvlib.logits import predict
from dsvlib.support_set import SupportSet

# all that the two protocols differ in
FIELD: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "halfway",
}
PAPER: dict[str, Any] = {
    "optimizer": "adam",
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
}


def _training(
    protocol: dict[str, Any], epochs: int, augmentation: AugmentationConfig | None
) -> TrainConfig:
    return TrainConfig(
        epochs=epochs,
        batch_size=256,
        augmentation=augmentation,
        log_every=max(epochs, 1),
        **protocol,
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How networks are retrained; the default is the field's protocol without augmentation."""

    training: TrainConfig = field(
        default_factory=lambda: EvaluationConfig.field_protocol().training
    )

    @classmethod
    def field_protocol(
        cls, *, epochs: int = 300, augmentation: AugmentationConfig | None = None
    ) -> EvaluationConfig:
        """Return the field's protocol: 300 epochs, or 1000 with DSA augmentation."""
        return cls(training=_training(FIELD, epochs, augmentation))

    @classmethod
    def paper_protocol(
        cls, *, epochs: int = 300, augmentation: AugmentationConfig | None = None
    ) -> EvaluationConfig:
        """Return the DSV paper's protocol: Adam at 1e-4, its defaults otherwise."""
        return cls(training=_training(PAPER, epochs, augmentation))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Test accuracy in [0, 1] after the last epoch, one network per seed.

    `accuracies` is [seeds]; `per_class` has a row per seed and class (seed, class, accuracy).
    """

    accuracies: Tensor
    per_class: pd.DataFrame

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; NaN for a single one."""
        return float(self.accuracies.std()) if len(self.accuracies) > 1 else float("nan")

    def __repr__(self) -> str:
        return f"Evaluation({self.mean:.4f} ± {self.std:.4f} over {len(self.accuracies)} seeds)"


def evaluate(
    samples: SupportSet,
    test: AnySplit,
    *,
    build_model: Callable[[], nn.Module],
    config: EvaluationConfig | None = None,
    seeds: Iterable[int] = range(5),
    together: int | None = None,
) -> Evaluation:
    """Train a fresh network on `samples` for each seed and return test accuracies.

    Parameters
    ----------
    samples
        The set to learn from; its multipliers are not used, so that every method is treated alike.
    test
        Real test data: a split, or any torch Dataset or DataLoader of (image, label).
    build_model
        Makes a fresh network, e.g. ``lambda: build_model("convnet", num_classes=10, shape=shape)``;
        called once per seed with torch's global generator seeded and afterwards restored.
    seeds
        One network each; a seed fixes the initial weights and, from a stream of their own, the
        batches and the augmentation.
    together
        How many networks are trained in one pass: the same accuracies up to rounding. None: one on
        a CPU, where more are no faster, and ten at most on a GPU (gain not measured yet). Networks
        that torch.func cannot stack, such as with dropout, take turns, as does training with
        adversarial images, averages, a polish or bfloat16; a warning says so where a number of
        networks was asked for.

    Raises ValueError where the labels do not fit the network, no seed is given or `build_model`
    returns the same network twice; TypeError where it is, or returns, something else.
    """
    config = config or EvaluationConfig()
    if isinstance(seeds, int):
        raise TypeError(f"seeds: expected several whole numbers, got {seeds}; pass range({seeds})")
    test = as_split(test)
    target = as_labels(test.labels)
    check_same_length(test_inputs=len(check_inputs(test.inputs)), test_labels=len(target))
    target = (target.argmax(dim=1) if target.is_floating_point() else target).cpu()
    if together is not None:
        check_count("together", together)
    if isinstance(build_model, nn.Module):
        raise TypeError(
            f"build_model: expected a function that builds a fresh network, got the network "
            f"{type(build_model).__name__}; pass e.g. lambda: {type(build_model).__name__}(…)"
        )
    accuracies, rows = [], []
    pending, seen = list(seeds), WeakSet[nn.Module]()
    while pending:
        networks = [_fresh(build_model, pending[0], seen)]
        size = together or (10 if device_of(networks[0]).type == "cuda" else 1)
        group, pending = pending[:size], pending[size:]
        networks += [_fresh(build_model, seed, seen) for seed in group[1:]]
        for network in networks:
            outputs = logits_of(network, samples.inputs[:1]).shape[1]
            for labels in (as_labels(samples.labels), as_labels(test.labels)):
                check_label_range(labels, outputs)
            logits_of(network, test.inputs[:1])  # a wrong shape is told before the training
        _train(networks, samples, config.training, group, warn=together is not None)
        for seed, network in zip(group, networks, strict=True):
            right = (predict(logits_of(network, test.inputs)).cpu() == target).float()
            accuracies.append(right.mean())
            rows += [
                {"seed": seed, "class": int(k), "accuracy": float(right[target == k].mean())}
                for k in target.unique()
            ]
    if not accuracies:
        raise ValueError("seeds: expected at least one seed, got none; pass e.g. range(5)")
    return Evaluation(torch.stack(accuracies), pd.DataFrame(rows))


def _fresh(build_model: Callable[[], nn.Module], seed: int, seen: WeakSet[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_model()
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"build_model: expected a function that returns a torch.nn.Module, got "
            f"{type(network).__name__}; pass e.g. lambda: build_model('convnet', …)"
        )
    if network in seen:
        raise ValueError(
            "build_model: expected a fresh network at each call, got the same one again, which "
            "has learned already; build it, or a copy, inside the function"
        )
    seen.add(network)
    return network


def _train(
    networks: list[nn.Module],
    samples: SupportSet,
    config: TrainConfig,
    seeds: list[int],
    *,
    warn: bool,
) -> None:
    """Train a network of each seed: together, or in turn where there is one or that cannot be."""
    if len(networks) > 1:
        streams = [_batch_stream(seed) for seed in seeds]
        reason = train_together(networks, samples, config=config, generators=streams)
        if reason is None:
            return
        if warn:
            warnings.warn(
                f"together: networks are trained one after the other, as with together=1, since "
                f"they cannot be in one pass ({reason})",
                stacklevel=3,
            )
    for network, seed in zip(networks, seeds, strict=True):
        train(network, samples, config=config, generator=_batch_stream(seed))


def _batch_stream(seed: int) -> torch.Generator:
    """Return a generator of its own: the stream of `seed` itself has drawn the weights."""
    parent = torch.Generator().manual_seed(seed)
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=parent)))
