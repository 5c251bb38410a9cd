"""Algorithm 1 against itself, written out: every sample's gradient, Adam and the priors by hand.

The reference knows nothing of `dsvlib.synthesis`; it shares only the random numbers of A with it.
Each switch of `SynthesisConfig` is turned alone and followed step by step in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, SHAPE, build
from scipy.optimize import nnls
from torch import Tensor, nn

from dsvlib import AugmentationConfig, Status, SupportSet, SynthesisConfig, residuals, synthesize
from dsvlib.augmentation import apply, draw
from dsvlib.synthesis import Step

LABELS = torch.tensor([0, 1, 2, 0, 1])
A = AugmentationConfig(translate=0.25, flip=0.5, cutout=0.3, noise=0.2, fill=-0.4)
BARE = SynthesisConfig(
    steps=5, multiplier_learning_rate=0.1, augmented_weight=0.0, tv_weight=0.0, log_every=1
)
SOFT = torch.tensor([[0.6, 0.4, 0], [0, 0.3, 0.7], [0.2, 0.2, 0.6], [1, 0, 0], [0, 0.9, 0.1]])


def smooth_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.softplus(-(2 * labels - 1) * logits[:, 0])


@dataclass(frozen=True)
class Case:
    """One switch: what differs from BARE, and from the plain call."""

    changes: dict[str, Any]
    model: str = "conv"
    labels: Tensor = LABELS
    bounds: tuple[float, float] | None = None
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    params: tuple[str, ...] | None = None

    @property
    def config(self) -> SynthesisConfig:
        return replace(BARE, **self.changes)


CASES = {
    "bare": Case({}),
    "dense": Case({}, model="dense"),
    "batch norm": Case({}, model="conv-batch"),
    "augmented": Case({"augmented_weight": 1.0, "augmentation": A}),
    "eta": Case({"augmented_weight": 5.0, "augmentation": A}),
    "constant schedule": Case({"schedule": "constant"}),
    "rate": Case({"learning_rate": 0.02}),
    "betas": Case({"betas": (0.5, 0.8)}),
    "rate of multipliers": Case({"multiplier_learning_rate": 0.0}),
    "initial multiplier": Case({"initial_multiplier": 0.3}),
    "l1": Case({"distance": "l1"}),
    "l2": Case({"distance": "l2"}),
    "mean": Case({"distance": "l2", "reduction": "mean", "initial_multiplier": 4.0}),
    "mean, cosine": Case({"reduction": "mean"}),
    "alpha": Case({"stationarity_weight": 0.5}),
    "no stationarity": Case({"stationarity_weight": 0.0}),
    "beta 1": Case({"primal_weight": 3.0}),
    "no primal": Case({"primal_weight": 0.0}),
    "tv": Case({"tv_weight": 0.7}),
    "norm": Case({"norm_weight": 0.7}),
    "norm target": Case({"norm_weight": 0.7, "norm_target": -0.8}),
    "clamp": Case({"multiplier_learning_rate": 0.9, "steps": 8}),
    "floor": Case({"multiplier_learning_rate": 0.9, "minimum_multiplier": 0.25, "steps": 8}),
    "remove": Case(
        {
            "multiplier_learning_rate": 0.45,
            "negative_multiplier": "remove",
            "schedule": "constant",
            "steps": 9,
        }
    ),
    "remove, mean": Case(
        {
            "multiplier_learning_rate": 0.45,
            "negative_multiplier": "remove",
            "reduction": "mean",
            "norm_weight": 0.1,
            "steps": 9,
        }
    ),
    "half size": Case({"resolutions": (0.5,)}),
    "growing": Case({"resolutions": (0.5, 1.0), "steps": 7, "tv_weight": 0.1}),
    "jitter": Case(
        {
            "resolutions": (0.5, 1.0),
            "growing_jitter": True,
            "augmented_weight": 1.0,
            "augmentation": AugmentationConfig(translate=0.5),
        }
    ),
    "bounds": Case({"learning_rate": 0.5, "resolutions": (0.5, 1.0)}, bounds=(-0.6, 0.4)),
    "soft labels": Case({}, labels=SOFT.double()),
    "loss": Case({}, loss_fn=smooth_loss),
    "single logit": Case({}, model="score", labels=LABELS % 2, loss_fn=binary_loss),
    "last layer": Case({}, params=("5.weight", "5.bias")),
    "everything": Case(
        {
            "augmented_weight": 2.0,
            "augmentation": A,
            "tv_weight": 0.2,
            "norm_weight": 0.1,
            "norm_target": -0.5,
            "resolutions": (0.5, 1.0),
            "negative_multiplier": "remove",
            "multiplier_learning_rate": 0.45,
            "stationarity_weight": 0.8,
            "primal_weight": 0.3,
            "steps": 8,
        },
        bounds=(-2.0, 2.0),
    ),
}


def network(case: Case) -> nn.Module:
    model = build("conv" if case.model == "score" else case.model).eval()
    if case.model == "score":
        model[5] = nn.Linear(16, 1).double()
        with torch.no_grad():
            model[5].weight.copy_(torch.linspace(-1, 1, 16)[None])
            model[5].bias.fill_(0.1)
    return model


def start() -> Tensor:
    return torch.randn(len(LABELS), *SHAPE, generator=torch.Generator().manual_seed(1)).double()


@dataclass
class Walk:
    """What the reference saw: X at full size, Λ and L_total at each step, and the labels left."""

    inputs: list[Tensor]
    multipliers: list[Tensor]
    totals: list[float]
    labels: Tensor
    counts: list[int]


def loss_of(case: Case, logits: Tensor, label: Tensor) -> Tensor:
    return (case.loss_fn or (lambda a, b: F.cross_entropy(a, b, reduction="none")))(logits, label)[
        0
    ]


def kkt(case: Case, model: nn.Module, x: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """α·D(θ, −Σλ∇L) + β1·L_primal, one sample at a time."""
    names = case.params or [name for name, _ in model.named_parameters()]
    theta = [dict(model.named_parameters())[name] for name in names]
    flat = torch.cat([value.reshape(-1) for value in theta]).detach()
    gradient, primal = torch.zeros_like(flat), x.new_zeros(())
    for i in range(len(x)):
        logits = model(x[i : i + 1])
        own = loss_of(case, logits, labels[i : i + 1])
        parts = torch.autograd.grad(own, theta, create_graph=True)
        gradient = gradient + weights[i] * torch.cat([part.reshape(-1) for part in parts])
        wanted = labels[i].argmax() if labels.ndim == 2 else labels[i]
        said = logits[0].argmax() if logits.shape[1] > 1 else (logits[0, 0] > 0).long()
        primal = primal + (0 if said == wanted else 1) * own / len(x)
    gap = flat + gradient
    value = {
        "l1": gap.abs().sum() / len(flat),
        "l2": (gap**2).sum() / len(flat),
        "cosine": 1 + (flat @ gradient) / (flat @ flat).sqrt() / (gradient @ gradient).sqrt(),
    }[case.config.distance]
    return case.config.stationarity_weight * value + case.config.primal_weight * primal


def priors(config: SynthesisConfig, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    variation = x.new_zeros(())
    for r in range(height):
        for s in range(width):
            if r + 1 < height:
                variation = variation + (x[:, :, r + 1, s] - x[:, :, r, s]).abs().sum()
            if s + 1 < width:
                variation = variation + (x[:, :, r, s + 1] - x[:, :, r, s]).abs().sum()
    size = n * channels * height * width
    distance = ((x - config.norm_target) ** 2).sum()
    return (config.tv_weight * variation + config.norm_weight * distance) / size


def reference(case: Case, model: nn.Module, rng: torch.Generator) -> Walk:
    """Algorithm 1: step, clamp, remove, at each resolution."""
    config, labels = case.config, case.labels
    low, high = case.bounds or (-math.inf, math.inf)
    x = start().clamp(low, high)
    multipliers = torch.full((len(x),), config.initial_multiplier).double()
    walk = Walk([], [], [], labels, [])
    stages = config.resolutions or (1.0,)
    for number, fraction in enumerate(stages):
        side = round(fraction * SHAPE[-1])
        if side != x.shape[-1]:
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True).clamp(low, high)
        steps = len(range(number, config.steps, len(stages)))
        share = fraction / max(stages) if config.growing_jitter else 1.0
        shifted = replace(config.augmentation, translate=share * config.augmentation.translate)
        first, second = [0.0, 0.0], [0.0, 0.0]
        for step in range(steps):
            values = [x.requires_grad_(), multipliers.requires_grad_()]
            full = x
            if side != SHAPE[-1]:
                full = F.interpolate(x, SHAPE[1:], mode="bilinear")
            weights = multipliers / len(x) if config.reduction == "mean" else multipliers
            total = kkt(case, model, full, weights, labels) + priors(config, full)
            if config.augmented_weight:
                numbers = draw(shifted, len(x), SHAPE, generator=rng, dtype=torch.float64)
                seen = apply(full, numbers)
                total = total + config.augmented_weight * kkt(case, model, seen, weights, labels)
            slopes = torch.autograd.grad(total, values, materialize_grads=True)
            decay = (1 + math.cos(math.pi * step / steps)) / 2
            decay = decay if config.schedule == "cosine" else 1.0
            rates = (config.learning_rate, config.multiplier_learning_rate)
            b1, b2 = config.betas
            for i, (slope, rate) in enumerate(zip(slopes, rates, strict=True)):
                first[i] = b1 * first[i] + (1 - b1) * slope
                second[i] = b2 * second[i] + (1 - b2) * slope**2
                mean, square = first[i] / (1 - b1 ** (step + 1)), second[i] / (1 - b2 ** (step + 1))
                values[i] = values[i].detach() - decay * rate * mean / (square.sqrt() + 1e-8)
            x, multipliers = values[0].clamp(low, high), values[1]
            if config.negative_multiplier == "clamp":
                multipliers = multipliers.clamp(min=config.minimum_multiplier)
            keep = multipliers >= 0
            x, multipliers, labels = x[keep], multipliers[keep], labels[keep]
            first, second = [m[keep] for m in first], [m[keep] for m in second]
            full = x if side == SHAPE[-1] else F.interpolate(x, SHAPE[1:], mode="bilinear")
            full = full.clamp(low, high)
            shown = multipliers / len(x) if config.reduction == "mean" else multipliers
            walk.inputs.append(full)
            walk.multipliers.append(shown)
            walk.totals.append(float(total.detach()))
            walk.counts.append(len(x))
    walk.labels = labels
    return walk


def best_multipliers(case: Case, model: nn.Module, samples: SupportSet) -> Tensor:
    """λ times the a that minimises ‖θ + a·Σλ∇L‖, by least squares on that one column."""
    names = case.params or [name for name, _ in model.named_parameters()]
    theta = [dict(model.named_parameters())[name] for name in names]
    losses = [
        loss_of(case, model(samples.inputs[i : i + 1]), samples.labels[i : i + 1])
        for i in range(len(samples))
    ]
    total = sum(m * loss for m, loss in zip(samples.multipliers, losses, strict=True))
    column = np.concatenate([g.numpy().ravel() for g in torch.autograd.grad(total, theta)])
    flat = np.concatenate([value.detach().numpy().ravel() for value in theta])
    return samples.multipliers * np.linalg.lstsq(column[:, None], -flat, rcond=None)[0][0]


def follow(case: Case, model: nn.Module, **options: Any) -> tuple[Any, list[Step]]:
    steps: list[Step] = []
    params = None
    if case.params is not None:
        params = {name: dict(model.named_parameters())[name] for name in case.params}
    solution = synthesize(
        model,
        case.labels,
        SHAPE,
        config=case.config,
        init=start(),
        bounds=case.bounds,
        params=params,
        loss_fn=case.loss_fn,
        generator=torch.Generator().manual_seed(7),
        on_step=steps.append,
        **options,
    )
    return solution, steps


CLOSE = {"rtol": 1e-8, "atol": 1e-9}


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_every_switch_follows_the_algorithm_written_out(name: str, batch_size: int | None) -> None:
    case = CASES[name]
    model = network(case)
    walk = reference(case, model, torch.Generator().manual_seed(7))
    solution, steps = follow(case, model, batch_size=batch_size)
    assert solution.status is Status.ALL_STEPS
    assert [len(step.inputs) for step in steps] == walk.counts
    for step, x, multipliers, total in zip(
        steps, walk.inputs, walk.multipliers, walk.totals, strict=True
    ):
        torch.testing.assert_close(step.inputs, x, **CLOSE)
        torch.testing.assert_close(step.multipliers, multipliers, **CLOSE)
        assert step.total == pytest.approx(total, rel=1e-8)
    assert list(solution.history["total"]) == pytest.approx(walk.totals, rel=1e-8)
    assert torch.equal(solution.samples.labels, walk.labels)
    expected = SupportSet(walk.inputs[-1], walk.labels, walk.multipliers[-1])
    torch.testing.assert_close(solution.samples.inputs, expected.inputs, **CLOSE)
    scaled = case.config.distance == "cosine" and case.config.stationarity_weight
    wanted = best_multipliers(case, model, expected) if scaled else expected.multipliers
    torch.testing.assert_close(solution.samples.multipliers, wanted, **CLOSE)


def test_the_cases_reach_what_they_are_there_for() -> None:
    def counts(name: str) -> list[int]:
        return [len(step.inputs) for step in follow(CASES[name], network(CASES[name]))[1]]

    for name in ("remove", "remove, mean", "everything"):
        left = counts(name)
        assert 0 < left[-1] == left[-2] < len(LABELS)  # steps follow a removal
    for name, low in (("clamp", 0.0), ("floor", 0.25)):
        lowest = [float(s.multipliers.min()) for s in follow(CASES[name], network(CASES[name]))[1]]
        assert min(lowest) == pytest.approx(low)


# --- a problem whose answer is known -------------------------------------------------------------


def softmax_regression() -> nn.Linear:
    layer = nn.Linear(4, CLASSES, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(
            torch.randn(CLASSES, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        )
    return layer


def test_softmax_regression_is_explained_but_for_the_part_that_no_sample_can_explain() -> None:
    """∇_W L = (p − e_y)xᵀ has columns that sum to 0: the mean of W's rows is out of reach."""
    layer = softmax_regression()
    weight = layer.weight.detach()
    unreachable = weight.mean(dim=0).norm() * CLASSES**0.5 / weight.norm()
    assert 0.2 < unreachable < 0.9
    config = SynthesisConfig(
        steps=400, learning_rate=0.1, multiplier_learning_rate=0.1, distance="l2"
    )
    found = synthesize(layer, [0, 1, 2] * 2, (4,), config=config)
    assert found.residuals.stationarity == pytest.approx(float(unreachable), rel=1e-4)


def test_with_inputs_at_rest_synthesis_is_non_negative_least_squares() -> None:
    layer = softmax_regression()
    labels = torch.arange(9) % CLASSES
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(4)).double()
    chance = layer(inputs).softmax(dim=1).detach() - torch.eye(CLASSES).double()[labels]
    columns = torch.einsum("nk,nd->kdn", chance, inputs).reshape(-1, 9).numpy()
    weight = layer.weight.detach().reshape(-1).numpy()
    best, left = nnls(columns, -weight)
    assert 0 < (best > 0).sum() < 9
    config = SynthesisConfig(
        steps=600,
        learning_rate=1e-12,
        multiplier_learning_rate=0.1,
        distance="l2",
        primal_weight=0.0,
    )
    found = synthesize(layer, labels, (4,), config=config, init=inputs)
    assert found.residuals.stationarity == pytest.approx(left / np.linalg.norm(weight), rel=1e-5)
    assert found.residuals.stationarity == pytest.approx(
        residuals(layer, SupportSet(inputs, labels, torch.as_tensor(best))).stationarity, rel=1e-5
    )
