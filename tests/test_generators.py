"""Whatever draws numbers takes a torch.Generator on the CPU and says so in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build, candidates

import dsvlib
from dsvlib.data.datasets import Split
from dsvlib.distillation import seen_images


def real() -> Split:
    labels = torch.arange(3).repeat(4)
    return Split(torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels)


def small() -> torch.nn.Module:
    return dsvlib.build_model("convnet", num_classes=3, shape=(1, 8, 8), width=2, depth=1)


QUICK = dsvlib.SynthesisConfig(steps=1)
STEP = dsvlib.GradientConfig(steps=1)
CALLS: dict[str, Callable[[Any], object]] = {
    "augment": lambda g: dsvlib.augment(real().inputs, dsvlib.augmentation.DSA, generator=g),
    "class_means": lambda g: dsvlib.class_means(real(), 2, generator=g),
    "fit_multipliers": lambda g: dsvlib.fit_multipliers(
        build("dense"), candidates().inputs, candidates().labels,
        method="gradient", config=STEP, generator=g,
    ),
    "match_distributions": lambda g: dsvlib.match_distributions(
        real(), per_class=1, config=dsvlib.DistributionMatchingConfig(steps=1), generator=g
    ),
    "match_gradients": lambda g: dsvlib.match_gradients(
        real(), per_class=1, config=dsvlib.GradientMatchingConfig(steps=1), generator=g
    ),
    "random_subset": lambda g: dsvlib.random_subset(real(), 1, generator=g),
    "seen_images": lambda g: seen_images(real(), 1, generator=g),
    "synthesize": lambda g: dsvlib.synthesize(
        small(), range(3), (1, 8, 8), config=QUICK, generator=g
    ),
    "train": lambda g: dsvlib.train(
        small(), real(), config=dsvlib.TrainConfig(epochs=1), generator=g
    ),
}  # fmt: skip


def test_every_function_that_draws_is_here() -> None:
    public = {name: getattr(dsvlib, name) for name in dsvlib.__all__}
    drawing = {
        name
        for name, value in public.items()
        if inspect.isfunction(value) and "generator" in inspect.signature(value).parameters
    }
    assert drawing <= CALLS.keys()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_seed_in_place_of_a_generator_is_told_what_to_write(
    call: Callable[[Any], object],
) -> None:
    with pytest.raises(TypeError, match=r"got int 3; pass torch.Generator\(\).manual_seed\(3\)"):
        call(3)
    with pytest.raises(TypeError, match=r"expected a torch.Generator on the CPU, got str 7"):
        call("7")
    call(torch.Generator().manual_seed(3))
