"""Is one batched pass over seeds or classes faster than a loop? Why `evaluate` trains in turn.

Read ratios within a group, never the seconds of two runs. On one CPU core, stacked networks
(grouped convolutions) took 0.85 times as long as one after the other on ten digits, but 1.3 times
on ten CIFAR images and twice on a hundred digits, so `evaluate` keeps to the loop. For the
gradients in `match_gradients`, batching wins on the few synthetic images of a class and loses on
its many real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dsvlib.classifiers.architectures import build_model
from dsvlib.distillation import gradient_matching

SEEDS, EPOCHS = 3, 3
SIZES = {  # images, their shape, the network's options
    "digits-10": (10, (1, 16, 16), {"width": 32, "depth": 2}),
    "digits-100": (100, (1, 16, 16), {"width": 32, "depth": 2}),
    "cifar-10": (10, (3, 32, 32), {}),
}


def networks(shape: tuple[int, int, int], options: dict[str, Any]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [build_model("convnet", num_classes=10, shape=shape, **options) for _ in range(SEEDS)]


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=5e-4)


def descend(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def one_after_the_other(models: list[nn.Module], x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    for model in models:
        descend(sgd(model.parameters()), lambda m=model: F.cross_entropy(m(x), y))
    return [{k: v.detach() for k, v in model.named_parameters()} for model in models]


def stacked(models: list[nn.Module], x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    stack, _ = stack_module_state(models)
    stack = {k: v.detach().requires_grad_() for k, v in stack.items()}
    losses = vmap(lambda own: F.cross_entropy(functional_call(models[0], own, (x,)), y))
    descend(sgd(stack.values()), lambda: losses(stack).sum())
    return [{k: v[seed].detach() for k, v in stack.items()} for seed in range(len(models))]


@pytest.mark.parametrize("train", [one_after_the_other, stacked])
@pytest.mark.parametrize("size", SIZES)
def test_retraining_of_all_seeds(benchmark: Any, size: str, train: Callable[..., Any]) -> None:
    benchmark.group = f"retraining, {size}"
    count, shape, options = SIZES[size]
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    y = torch.arange(count) % 10
    for one, other in zip(
        one_after_the_other(networks(shape, options), x, y),
        stacked(networks(shape, options), x, y),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    benchmark.pedantic(
        train, setup=lambda: ((networks(shape, options), x, y), {}), rounds=3, warmup_rounds=1
    )


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
