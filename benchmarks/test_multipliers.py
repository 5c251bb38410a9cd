"""Time and memory of exact multipliers: 1,347 digits, and a scaled CIFAR-10 case.

Run with ``pytest benchmarks``; the time budget of the digits is ten seconds on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dsvlib import GradientConfig, NNLSConfig, TrainConfig, build_model, fit_multipliers, train
from dsvlib.conditions import evaluation_mode
from dsvlib.datasets import load_dataset
from dsvlib.multipliers import _gram, _Problem


@pytest.fixture(scope="module")
def classifier():
    """A briefly trained digits classifier: gradients of confident samples are tiny, as they are."""
    data = load_dataset("digits")
    torch.manual_seed(0)
    model = build_model("convnet", num_classes=10, shape=data.shape, width=32, depth=2, norm="none")
    train(model, data.train, config=TrainConfig(epochs=15, weight_decay=2e-3))
    return model, data.train


def test_digits_gram_matrix(benchmark, classifier):
    model, split = classifier
    problem = _Problem(model, split.inputs, split.labels, None, None, NNLSConfig().batch_size)

    def gram():
        with evaluation_mode(model):
            return _gram(problem, NNLSConfig().memory)

    benchmark.pedantic(gram, rounds=2, warmup_rounds=1)


def test_digits_nnls(benchmark, classifier):
    model, split = classifier
    solution = benchmark.pedantic(
        fit_multipliers, (model, split.inputs, split.labels), rounds=2, warmup_rounds=1
    )
    assert solution.certificate.satisfied


def test_digits_one_gradient_step(benchmark, classifier):
    model, split = classifier
    benchmark.pedantic(
        fit_multipliers,
        (model, split.inputs, split.labels),
        {"method": "gradient", "config": GradientConfig(steps=1)},
        rounds=2,
        warmup_rounds=1,
    )


SCALED = """
import json, resource
import torch
torch.set_num_threads(1)
from dsvlib import NNLSConfig, build_model, fit_multipliers
torch.manual_seed(0)
model = build_model("convnet", num_classes=10, shape=(3, 32, 32))
inputs, labels = torch.randn({count}, 3, 32, 32), torch.arange({count}) % 10
warm = fit_multipliers(model, inputs[:64], labels[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
solution = fit_multipliers(model, inputs, labels, config=NNLSConfig(memory={memory}))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([before / 1e6, after / 1e6, solution.certificate.satisfied]))
"""


def test_cifar_shaped_memory(benchmark):
    """ConvNet-3 and 300 images, G 0.38 GB, in a tenth of the default budget: three panels.

    Memory grows with the budget alone, so 5,000 images in 2.5 GB follow from it: G is then 6.4 GB.
    """
    code = SCALED.format(count=300, memory=0.25)

    def measure():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(run.stdout)

    before, after, satisfied = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["gigabytes_before"] = before
    benchmark.extra_info["gigabytes"] = after
    assert satisfied
    assert after - before < 0.25 + 0.3  # the rest: conversion to float64 and allocator slack
