"""Is one batched pass over seeds or classes faster than a loop? On a CPU, `evaluate` loops.

Three networks trained together (`evaluate(together=3)`) and one after the other take turns; time is
CPU time. On one CPU core, together took 0.99 times as long on ten digits, 1.62 times on a hundred,
1.17 times on ten CIFAR images at width 32 and 1.39 times at width 128. On a GPU it is not measured
yet. For the gradients in `match_gradients`, batching wins on the few synthetic images of a class
and loses on its many real ones.
"""

from __future__ import annotations

import time
from statistics import quantiles
from typing import Any

import pytest
import torch
from torch import nn

from dsvlib.classifiers.architectures import build_model
from dsvlib.classifiers.training import train, train_together
from dsvlib.data.datasets import Split
from dsvlib.distillation import gradient_matching
from dsvlib.evaluation import EvaluationConfig

SEEDS, EPOCHS, ROUNDS = 3, 20, 5
SIZES = {  # images, their shape, the network's options
    "digits-10": (10, (1, 16, 16), {"width": 32, "depth": 2}),
    "digits-100": (100, (1, 16, 16), {"width": 32, "depth": 2}),
    "cifar-10-narrow": (10, (3, 32, 32), {"width": 32}),
    "cifar-10": (10, (3, 32, 32), {}),
}


def networks(shape: tuple[int, int, int], options: dict[str, Any]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [build_model("convnet", num_classes=10, shape=shape, **options) for _ in range(SEEDS)]


def retrain(together: bool, models: list[nn.Module], split: Split) -> float:
    """Return the CPU seconds of the field's protocol on every model."""
    config = EvaluationConfig.field_protocol(epochs=EPOCHS).training
    generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    start = time.process_time()
    if together:
        assert train_together(models, split, config=config, generators=generators) is None
    else:
        for model, generator in zip(models, generators, strict=True):
            train(model, split, config=config, generator=generator)
    return time.process_time() - start


@pytest.mark.parametrize("size", SIZES)
def test_retraining_of_all_seeds(
    size: str, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    count, shape, options = SIZES[size]
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    split = Split(x, torch.arange(count) % 10)

    def measure() -> list[float]:
        pairs = [
            [retrain(together, networks(shape, options), split) for together in (True, False)]
            for _ in range(ROUNDS + 1)
        ]
        return [together / turns for together, turns in pairs[1:]]  # the first one warms up

    low, middle, high = quantiles(benchmark.pedantic(measure), n=4)
    benchmark.extra_info["ratio"] = middle
    with capsys.disabled():
        print(f"\n{size}: together {middle:.2f} × one after the other  [{low:.2f}, {high:.2f}]")


@pytest.mark.parametrize("way", ["loop", "batched"])
@pytest.mark.parametrize("images", [1, 32])
@pytest.mark.parametrize("size", ["digits-10", "cifar-10"])
def test_gradients_per_class(benchmark: Any, size: str, images: int, way: str) -> None:
    """One image per class is differentiated again, as synthetic ones are; 32 are not."""
    benchmark.group = f"gradients per class, {size}, {images} images"
    _, shape, options = SIZES[size]
    (network, *_) = networks(shape, options)
    x = torch.randn(10, images, *shape, requires_grad=images == 1)
    function = {"loop": gradient_matching._looped, "batched": gradient_matching._batched}[way]

    def run() -> None:
        gradients = function(network, x)
        if x.requires_grad:
            torch.autograd.grad(gradient_matching.gradient_distance(gradients, target), x)

    target = [torch.randn_like(g) for g in function(network, x)]
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
