"""The plane: solvers against closed forms or another solver, clouds against their promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor, nn

from companion import toy_problems
from dsvlib import SupportSet, residuals


def rng(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def points(inputs: list[list[float]], labels: list[int]) -> SupportSet:
    count = len(labels)
    return SupportSet(torch.tensor(inputs).double(), torch.tensor(labels), torch.ones(count))


PAIR = points([[1.0, 0.0], [3.0, 0.0]], [0, 1])


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", [toy_problems.separable, toy_problems.three_clouds, toy_problems.two_moons]
)
def test_data_come_from_the_generator_alone(draw):
    first, again, other = (draw(30, generator=rng(seed)) for seed in (1, 1, 2))
    assert first.inputs.shape == (30, 2)
    assert first.inputs.dtype == torch.float64
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.inputs, other.inputs)


def test_separable_leaves_the_corridor_empty():
    data = toy_problems.separable(200, generator=rng(), gap=0.5)
    height = data.inputs @ torch.tensor([0.8, 0.6]).double() - 0.2
    assert height.abs().min() > 0.5
    assert data.inputs.abs().max() <= 3
    assert torch.equal(data.labels, (height > 0).long())
    for gap in (-1.0, 2.5, float("nan")):
        with pytest.raises(ValueError, match="gap: expected a number from 0 to 2"):
            toy_problems.separable(3, generator=rng(), gap=gap)


def test_three_clouds_are_centred_on_a_circle():
    data = toy_problems.three_clouds(90, generator=rng(), spread=0.0)
    assert data.labels.bincount().tolist() == [30, 30, 30]
    torch.testing.assert_close(data.inputs.norm(dim=1), torch.full((90,), 1.6).double())
    torch.testing.assert_close(data.inputs.mean(0), torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_two_moons_are_half_circles_about_standardised():
    data = toy_problems.two_moons(4000, generator=rng(), noise=0.0)
    arc = data.inputs * torch.tensor([0.89, 0.54]).double()
    sign = 1 - 2 * data.labels.double()
    centre = torch.stack([-0.5 * sign, -0.25 * sign], dim=1)
    torch.testing.assert_close((arc - centre).norm(dim=1), torch.ones(4000).double())
    noisy = toy_problems.two_moons(4000, generator=rng()).inputs
    assert noisy.mean(0).abs().max() < 0.1
    torch.testing.assert_close(noisy.std(0), torch.ones(2).double(), atol=0.1, rtol=0)


# --- linear models -------------------------------------------------------------------------------


def test_svm_of_two_points_in_closed_form():
    # f(x) = x₁ − 2, and w = α (x⁺ − x⁻) = 2α e₁ gives α = 1/2
    layer, multipliers = toy_problems.hard_margin_svm(PAIR.inputs, PAIR.labels)
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[1.0, 0.0]]).double())
    torch.testing.assert_close(layer.bias.detach(), torch.tensor([-2.0]).double())
    torch.testing.assert_close(multipliers, torch.full((2,), 0.5).double())


@pytest.mark.parametrize("seed", range(5))
def test_dual_and_primal_svm_meet(seed):
    data = toy_problems.separable(40, generator=rng(seed))
    layer, multipliers = toy_problems.hard_margin_svm(data.inputs, data.labels)
    primal = toy_problems.primal_svm(data.inputs, data.labels)
    torch.testing.assert_close(primal.weight, layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(primal.bias, layer.bias, rtol=1e-5, atol=1e-5)
    signs = 2 * data.labels.double() - 1
    torch.testing.assert_close((multipliers * signs) @ data.inputs, layer.weight.detach()[0])
    svc = SVC(kernel="linear", C=1e8, tol=1e-10).fit(data.inputs.numpy(), data.labels.numpy())
    assert multipliers.nonzero().ravel().tolist() == sorted(svc.support_.tolist())


def test_svm_refuses_what_no_line_separates_and_other_classes():
    mixed = points([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], [0, 1, 0])
    with pytest.raises(ValueError, match="that a line separates"):
        toy_problems.hard_margin_svm(mixed.inputs, mixed.labels)
    three = toy_problems.three_clouds(9, generator=rng())
    for solve in (toy_problems.hard_margin_svm, toy_problems.primal_svm):
        with pytest.raises(ValueError, match=r"classes 0 and 1, got \[0, 1, 2\]"):
            solve(three.inputs, three.labels)


@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_softmax_regression_is_stationary_at_uniform_multipliers(strength):
    data = toy_problems.three_clouds(30, generator=rng())
    layer = toy_problems.logistic_regression(data.inputs, data.labels, strength)
    assert layer.weight.shape == (3, 2)
    assert layer.bias is None
    uniform = SupportSet(data.inputs, data.labels, strength * torch.ones(30).double())
    assert residuals(layer, uniform).stationarity < 1e-6


def test_logistic_regression_of_two_classes_solves_its_equations():
    data = toy_problems.separable(30, generator=rng())
    layer = toy_problems.logistic_regression(data.inputs, data.labels, 2.0, bias=True)
    assert layer.weight.shape == (1, 2)
    signs = 2 * data.labels.double() - 1
    pull = 2.0 * torch.sigmoid(-signs * layer(data.inputs)[:, 0].detach()) * signs
    torch.testing.assert_close(pull @ data.inputs, layer.weight.detach()[0])
    assert abs(pull.sum()) < 1e-8
    with pytest.raises(ValueError, match="strength"):
        toy_problems.logistic_regression(data.inputs, data.labels, 0.0)


def test_linear_layer_is_a_copy_of_what_it_is_given():
    weight = np.array([[1.0, 2.0]])
    layer = toy_problems.linear_layer(weight, torch.tensor([3.0]))
    weight[:] = 0
    assert layer(torch.tensor([[1.0, 1.0]]).double()).item() == 6
    assert toy_problems.linear_layer(weight).bias is None
    with pytest.raises(ValueError, match=r"shape \[K, d\], got \[2\]"):
        toy_problems.linear_layer(np.zeros(2))


# --- networks ------------------------------------------------------------------------------------


def test_tanh_network_is_drawn_from_its_generator():
    first, again = (toy_problems.tanh_network(5, 3, generator=rng(1)) for _ in range(2))
    assert first(torch.zeros(4, 2).double()).shape == (4, 3)
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.dtype == torch.float64
    for layer in (first[0], first[2]):
        assert layer.weight.abs().max() <= layer.in_features**-0.5


def test_newton_finds_the_minimum_of_a_convex_problem():
    # one point at 0 with label 0: only b matters, w b₁ = −w b₀ = −(1 − p), p = σ(b₀ − b₁)
    model = toy_problems.linear_layer(torch.ones(2, 2), torch.ones(2))
    data = points([[0.0, 0.0]], [0])
    assert toy_problems.newton(model, data, weight_decay=0.1) < 1e-12
    torch.testing.assert_close(model.weight.detach(), torch.zeros(2, 2).double())
    high, low = model.bias.tolist()
    assert high == pytest.approx(-low)
    assert 0.1 * high == pytest.approx(1 / (1 + np.exp(high - low)))


def test_newton_makes_a_network_stationary_and_descends():
    data, decay = toy_problems.two_moons(60, generator=rng()), 0.01
    model = toy_problems.tanh_network(4, generator=rng())

    @torch.no_grad()
    def objective() -> float:
        theta = nn.utils.parameters_to_vector(model.parameters())
        losses = nn.functional.cross_entropy(model(data.inputs), data.labels)
        return float(losses + decay / 2 * theta @ theta)

    before = objective()
    assert toy_problems.newton(model, data, weight_decay=decay) < 1e-12
    assert objective() < before
    uniform = SupportSet(data.inputs, data.labels, torch.ones(60).double() / (60 * decay))
    assert residuals(model, uniform).stationarity < 1e-9
    with pytest.raises(ValueError, match="weight_decay"):
        toy_problems.newton(model, data, weight_decay=0.0)


def test_newton_leaves_mode_and_requires_grad():
    model = toy_problems.tanh_network(2, generator=rng()).train()
    toy_problems.newton(model, PAIR, weight_decay=0.1, steps=1)
    assert model.training
    assert all(value.requires_grad for value in model.parameters())


def units(rows: list[list[float]]) -> nn.Sequential:
    """Return a tanh network whose hidden units have the given (a, c) [units, 3]."""
    model = toy_problems.tanh_network(len(rows), generator=rng())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(rows)[:, :2])
        model[0].bias.copy_(torch.tensor(rows)[:, 2])
    return model


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], 1),
        ([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]], 1),  # tanh is odd
        ([[1.0, 2.0, 3.0], [1.0, 2.0, -3.0]], 2),
        ([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]], 2),  # another slope is another function
        ([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], 1),
        ([[1.0, 2.0, 3.0], [1.00001, 2.0, 3.0]], 1),
        ([[0.0, 0.0, 0.0]], 0),
    ],
)
def test_distinct_units(rows, count):
    assert toy_problems.distinct_units(units(rows)) == count


@pytest.mark.parametrize("first", [nn.ReLU(), nn.Linear(2, 2, bias=False)])
def test_distinct_units_reads_tanh_networks_only(first):
    with pytest.raises(ValueError, match=f"begins with {type(first).__name__}"):
        toy_problems.distinct_units(nn.Sequential(first, nn.Tanh(), nn.Linear(2, 2)))


# --- pictures and judgements ---------------------------------------------------------------------


def test_grid_scores_has_the_first_coordinate_first():
    layer = toy_problems.linear_layer(np.array([[1.0, 0.0], [0.0, 1.0]]))
    scores = toy_problems.grid_scores(layer, 2.0, side=5)
    ticks = torch.linspace(-2, 2, 5).double()
    torch.testing.assert_close(scores[:, :, 0], ticks[:, None].expand(5, 5))
    torch.testing.assert_close(scores[:, :, 1], ticks.expand(5, 5))
    for wrong in ({"box": 0.0}, {"box": 1.0, "side": 1}):
        with pytest.raises(ValueError, match=r"box|side"):
            toy_problems.grid_scores(layer, **wrong)


@pytest.mark.parametrize(("radius", "share"), [(0.0, 1 / 3), (1.0, 2 / 3), (9.0, 1.0)])
def test_fraction_near_counts_the_own_class_only(radius: float, share: float) -> None:
    inputs: Tensor = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 1.0]]).double()
    labels = torch.tensor([0, 1, 1])
    assert toy_problems.fraction_near(inputs, labels, PAIR, radius=radius) == pytest.approx(share)


def test_fraction_near_is_zero_where_the_class_is_missing():
    assert toy_problems.fraction_near(PAIR.inputs, torch.tensor([2, 2]), PAIR, radius=9.0) == 0
    with pytest.raises(ValueError, match="radius"):
        toy_problems.fraction_near(PAIR.inputs, PAIR.labels, PAIR, radius=-1.0)
