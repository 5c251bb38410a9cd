"""Wherever a part of a data set is taken, a torch Dataset of (image, label) gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dsvlib
from dsvlib import SupportSet, TrainConfig
from dsvlib.analysis.judges import svm_judge
from dsvlib.data.datasets import Split

SHAPE = (1, 8, 8)


def split() -> Split:
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randn(24, *SHAPE, generator=generator), torch.arange(24) % 2)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def gradients(data: Any) -> SupportSet:
    config = dsvlib.GradientMatchingConfig(steps=1, batch_real=4)
    return dsvlib.match_gradients(data, per_class=1, config=config).samples


def distributions(data: Any) -> SupportSet:
    config = dsvlib.DistributionMatchingConfig(steps=1, batch_real=4)
    return dsvlib.match_distributions(data, per_class=1, config=config).samples


def evaluated(data: Any) -> torch.Tensor:
    config = dsvlib.EvaluationConfig(training=TrainConfig(epochs=1))
    samples = SupportSet(split().inputs, split().labels, torch.ones(24))
    return dsvlib.evaluate(samples, data, build_model=network, config=config, seeds=[0]).accuracies


def by_lambda(data: Any) -> pd.DataFrame:
    samples = SupportSet(split().inputs, split().labels, torch.ones(24))
    return dsvlib.lambda_accuracy(samples, network(), data)


TAKEN: dict[str, Callable[[Any], Any]] = {
    "random_subset": lambda data: dsvlib.random_subset(data, 2),
    "class_means": lambda data: dsvlib.class_means(data),
    "herding": lambda data: dsvlib.herding(data, 2, model=network()),
    "k_center": lambda data: dsvlib.k_center(data, 2, model=network()),
    "forgetting": lambda data: dsvlib.forgetting(data, 2, hits=torch.ones(1, 24).bool()),
    "match_gradients": gradients,
    "match_distributions": distributions,
    "evaluate": evaluated,
    "lambda_accuracy": by_lambda,
    "svm_judge": lambda data: svm_judge(data)(split().inputs),
    "accuracy": lambda data: torch.tensor(dsvlib.accuracy(network(), data)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_torch_data_set_gives_the_same(name: str) -> None:
    pairs = TensorDataset(split().inputs, split().labels)
    expected = TAKEN[name](split())
    for data in (pairs, DataLoader(pairs, batch_size=5)):
        found = TAKEN[name](data)
        if isinstance(expected, SupportSet):
            assert torch.equal(found.inputs, expected.inputs)
            assert torch.equal(found.labels, expected.labels)
        elif isinstance(expected, pd.DataFrame):
            pd.testing.assert_frame_equal(found, expected)
        else:
            assert torch.equal(found, expected)
