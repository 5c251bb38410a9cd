"""Every object that reads a classifier, on every case, against one backward pass per sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES, Case
from scipy.optimize import nnls

from dsvlib import (
    GradientConfig,
    SupportSet,
    deepkkt_loss,
    explain,
    fit_multipliers,
    residuals,
    weighted_gradient,
)
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import SampleGradients, flatten
from dsvlib.ranking import rank

# slower but right, and said so: which of the cases that are is not what these tests are about
pytestmark = pytest.mark.filterwarnings("ignore:model. its gradients are computed sample by sample")


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest, untouched) -> Iterator[Case]:
    case = CASES[request.param]()
    case.model.train()
    inputs, labels = case.samples.inputs.clone(), case.samples.labels.clone()
    with untouched(case.model):
        yield case
    assert torch.equal(inputs, case.samples.inputs)
    assert torch.equal(labels, case.samples.labels)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    double = expected.dtype == torch.float64
    size = float(expected.abs().max())
    tolerance = (
        {"rtol": 1e-7, "atol": 1e-7 * size} if double else {"rtol": 1e-3, "atol": 1e-4 * size}
    )
    torch.testing.assert_close(found, expected, **tolerance)


def test_weighted_gradient(case):
    expected = case.samples.multipliers @ case.gradients()
    for _ in range(2):  # no trace of the first call
        found = weighted_gradient(case.model, case.samples, loss_fn=case.loss_fn)
        assert list(found) == list(dict(case.model.named_parameters()))
        close(flatten(found.values()), expected)


def test_products_with_the_matrix_of_gradients(case):
    expected, theta = case.gradients(), case.theta
    vector = torch.linspace(-1, 1, len(theta)).to(theta)
    samples = case.samples
    found = SampleGradients(
        case.model, samples.inputs, samples.labels, loss_fn=case.loss_fn, batch_size=4
    )
    with evaluation_mode(case.model):
        close(found.all(), expected)
        close(found.weighted_sum(samples.multipliers), samples.multipliers @ expected)
        close(found.directional(vector), expected @ vector)
        gram, projection = found.gram(1.0)
    close(torch.tensor(gram).to(theta), expected @ expected.T)
    close(torch.tensor(projection).to(theta), expected @ theta)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_deepkkt_loss_and_its_slopes_in_the_multipliers(case, distance):
    expected, theta = case.gradients(), case.theta
    weights = case.samples.multipliers.clone().requires_grad_()
    pull = weights @ expected
    if distance == "cosine":
        value = 1 + theta @ pull / theta.norm() / pull.norm()
    else:
        value = (theta + pull).square().mean()
    (slope,) = torch.autograd.grad(value, weights)
    mine = case.samples.multipliers.clone().requires_grad_()
    samples = replace(case.samples, multipliers=mine)
    loss = deepkkt_loss(
        case.model, samples, loss_fn=case.loss_fn, distance=distance, primal_weight=0.0
    )
    close(loss.detach(), value.detach())
    close(torch.autograd.grad(loss, mine)[0], slope)


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_residuals(case, batch_size):
    pull, theta = case.samples.multipliers @ case.gradients(), case.theta
    found = residuals(case.model, case.samples, loss_fn=case.loss_fn, batch_size=batch_size)
    assert found.stationarity == pytest.approx(
        float((theta + pull).norm() / theta.norm()), rel=1e-4
    )
    cosine = float(-theta @ pull / theta.norm() / pull.norm())
    assert found.cosine == pytest.approx(cosine, rel=1e-3, abs=1e-5)


def test_exact_multipliers(case):
    solution = fit_multipliers(
        case.model, case.samples.inputs, case.samples.labels, loss_fn=case.loss_fn
    )
    rows, theta = case.gradients().double().numpy(), case.theta.double().numpy()
    _, norm = nnls(rows.T, -theta)
    assert solution.certificate.satisfied
    assert solution.residuals.stationarity == pytest.approx(norm / np.linalg.norm(theta), rel=1e-4)


@pytest.mark.parametrize("memory", [0.0, 1.0], ids=["streamed", "held"])
def test_a_gradient_step(case, memory):
    """Adam's first step moves each λ by the rate, against the sign of its derivative."""
    expected, theta = case.gradients(), case.theta
    path = []
    fit_multipliers(
        case.model,
        case.samples.inputs,
        case.samples.labels,
        method="gradient",
        loss_fn=case.loss_fn,
        config=GradientConfig(steps=1, distance="l2", memory=memory, batch_size=4),
        on_step=lambda _, multipliers: path.append(multipliers),
    )
    unit = path[0][0]
    slope = expected @ (theta + path[0] @ expected)
    close((path[1] - path[0]) / unit, -0.1 * slope.sign())


@pytest.mark.filterwarnings("ignore:explain. expected the support vectors")
def test_explanation(case):
    """The sum over all terms is −⟨∇Φ_c, Σ λᵢ ∇Lᵢ⟩."""

    def first(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return logits[:, 0]

    asked = case.samples[:3]
    found = explain(case.model, asked.inputs, case.samples, classes=0, loss_fn=case.loss_fn)
    rows = case._replace(samples=asked, loss_fn=first).gradients()
    expected = -(rows @ case.gradients().T) * case.samples.multipliers
    close(found.contributions.to(expected), expected)


def test_ranking(case):
    if case.loss_fn is not None:
        pytest.skip("ranks by cross-entropy")
    table = rank(case.model, case.samples, views=1)
    pull, theta = case.samples.multipliers @ case.gradients(), case.theta
    assert table["share"].sum() == pytest.approx(
        float(-theta @ pull / theta.norm() / pull.norm()), rel=1e-3, abs=1e-5
    )


def test_slopes_in_the_inputs(case):
    """Against a central difference along one direction, where second derivatives exist."""
    if case.samples.inputs.dtype != torch.float64:
        pytest.skip("differences need float64")
    x = case.samples.inputs

    def value(inputs: torch.Tensor) -> torch.Tensor:
        samples = SupportSet(inputs, case.samples.labels, case.samples.multipliers)
        return deepkkt_loss(case.model, samples, loss_fn=case.loss_fn, primal_weight=0.0)

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(leaf), leaf)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    step = 1e-5
    expected = (value(x + step * along) - value(x - step * along)) / (2 * step)
    if "stop" in type(case.model).__name__.lower():
        pytest.skip("differences see the path that backward mode does not")
    torch.testing.assert_close((slope * along).sum(), expected.detach(), rtol=1e-4, atol=1e-7)
