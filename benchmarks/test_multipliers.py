"""Time and memory of exact multipliers: 1,347 digits, and a scaled CIFAR-10 case.

Run with ``pytest benchmarks``; the time budget of the digits is ten seconds on two idle cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from companion.recipes import classifier
from dsvlib import GradientConfig, NNLSConfig, fit_multipliers, load_dataset
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import SampleGradients


@pytest.fixture(scope="module")
def digits():
    """The shipped classifier and its 1,347 training images."""
    data = load_dataset("digits")
    model, _ = classifier("digits-convnet", data)
    return model, data.train


def test_digits_gram_matrix(benchmark, digits):
    model, split = digits
    gradients = SampleGradients(model, split.inputs, split.labels)

    def gram():
        with evaluation_mode(model):
            return gradients.gram(NNLSConfig().memory)

    benchmark.pedantic(gram, rounds=2, warmup_rounds=1)


def test_digits_nnls(benchmark, digits):
    model, split = digits
    solution = benchmark.pedantic(
        fit_multipliers, (model, split.inputs, split.labels), rounds=2, warmup_rounds=1
    )
    assert solution.certificate.satisfied


def test_digits_one_gradient_step(benchmark, digits):
    model, split = digits
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
    """ConvNet-3 and 300 images, whose gradients take 0.38 GB, with 0.2 GB allowed: three panels.

    Memory grows with the budget alone. 5,000 images, whose gradients take 6.4 GB, follow from it.
    """
    code = SCALED.format(count=300, memory=0.2)

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
    assert after - before < 0.2 + 0.3  # the rest: conversion to float64 and allocator slack
