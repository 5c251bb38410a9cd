"""The conditions against slow dense oracles in float64, and against support vector machines."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, SHAPE, Gain, build, candidates, delicate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from dsvlib import SupportSet, deepkkt_loss, residuals, total_variation, weighted_gradient
from dsvlib.conditions import best_scale, distance, squared_norm
from dsvlib.logits import cross_entropy

KINDS = ("dense", "conv", "conv-group", "conv-batch")
DISTANCES = ("cosine", "l1", "l2")


def oracle(model: nn.Module, samples: SupportSet, loss_fn=cross_entropy) -> dict[str, Tensor]:
    """Σ λ_i ∇L_i, one sample and one backward pass at a time."""
    model = model.eval()
    names, values = zip(*[p for p in model.named_parameters() if p[1].requires_grad], strict=True)
    total = [torch.zeros_like(v) for v in values]
    for i in range(len(samples)):
        loss = loss_fn(model(samples.inputs[i : i + 1]), samples.labels[i : i + 1]).sum()
        parts = torch.autograd.grad(loss, values, materialize_grads=True)
        total = [t + samples.multipliers[i] * p for t, p in zip(total, parts, strict=True)]
    return dict(zip(names, total, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12)


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in gradient.values()])


# --- the weighted gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_weighted_gradient_is_the_sum_of_per_sample_gradients(kind, soft):
    model, samples = build(kind), candidates(5, soft=soft)
    assert_close(weighted_gradient(model, samples), oracle(model, samples))


def test_soft_labels_of_one_class_are_hard_labels():
    model, samples = build("conv"), candidates(4)
    soft = replace(samples, labels=F.one_hot(samples.labels, CLASSES).double())
    assert_close(weighted_gradient(model, soft), weighted_gradient(model, samples))


@given(order=st.permutations(range(5)))
def test_order_of_samples_does_not_matter(order):
    model, samples = build("dense"), candidates(5)
    shuffled = samples[torch.tensor(order)]
    assert_close(weighted_gradient(model, shuffled), weighted_gradient(model, samples))


@given(
    index=st.integers(0, 4),
    share=st.floats(0, 1),
    multipliers=st.lists(st.floats(0, 100), min_size=5, max_size=5),
)
def test_a_sample_may_be_split_into_two_that_share_its_multiplier(index, share, multipliers):
    model = build("dense")
    samples = replace(candidates(5), multipliers=torch.tensor(multipliers, dtype=torch.float64))
    twice = samples[torch.tensor([0, 1, 2, 3, 4, index])]
    weights = twice.multipliers.clone()
    weights[index] *= share
    weights[5] *= 1 - share
    assert_close(
        weighted_gradient(model, replace(twice, multipliers=weights)),
        weighted_gradient(model, samples),
    )


def test_weighted_gradient_is_linear_in_the_multipliers():
    model, samples = build("dense"), candidates(4)
    doubled = weighted_gradient(model, replace(samples, multipliers=2 * samples.multipliers))
    single = weighted_gradient(model, samples)
    assert_close(doubled, {name: 2 * part for name, part in single.items()})


def test_custom_loss_is_taken_per_sample():
    def score(logits: Tensor, labels: Tensor) -> Tensor:
        return -(logits.gather(1, labels[:, None])[:, 0] ** 2)

    model, samples = build("dense"), candidates(5)
    assert_close(
        weighted_gradient(model, samples, loss_fn=score), oracle(model, samples, loss_fn=score)
    )


@pytest.mark.parametrize("function", [weighted_gradient, residuals])
def test_reduced_loss_is_rejected(function):
    with pytest.raises(ValueError, match=r"expected one loss per sample, shape \[4\], got \[\]"):
        function(build("dense"), candidates(4), loss_fn=F.cross_entropy)


def test_parameter_subset_gives_those_entries_only():
    model, samples = build("conv"), candidates(4)
    everything = oracle(model, samples)
    named = dict(model.named_parameters())
    chosen = ["5.weight", "0.bias"]
    subset = weighted_gradient(model, samples, params={name: named[name] for name in chosen})
    assert_close(subset, {name: everything[name] for name in chosen})


def test_frozen_parameters_are_left_out_unless_named():
    model, samples = build("conv"), candidates(4)
    full = oracle(model, samples)
    model[0].requires_grad_(False)
    assert list(weighted_gradient(model, samples)) == ["5.weight", "5.bias"]
    named = weighted_gradient(model, samples, params=dict(model.named_parameters()))
    assert_close(named, full)


def test_unused_parameter_has_gradient_zero():
    model = nn.Sequential(nn.Flatten(), Gain(), nn.Linear(32, 3)).double()
    gradient = weighted_gradient(model, candidates(3))
    assert torch.equal(gradient["1.unused"], torch.zeros(2, dtype=torch.float64))
    assert gradient["1.gain"] != 0


def test_shared_parameters_count_once():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(nn.Flatten(), layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(32, 3))
    model = model.double()
    assert_close(weighted_gradient(model, candidates(3)), oracle(model, candidates(3)))


def test_gradient_is_detached_where_nothing_requires_grad():
    samples = candidates(3)
    assert not any(g.requires_grad for g in weighted_gradient(build("dense"), samples).values())
    wanted = replace(samples, inputs=samples.inputs.clone().requires_grad_())
    assert all(g.requires_grad for g in weighted_gradient(build("dense"), wanted).values())
    with torch.no_grad():
        quiet = weighted_gradient(build("dense"), wanted)
    assert not any(g.requires_grad for g in quiet.values())


def test_dtype_follows_the_model():
    samples = candidates(3)
    single = SupportSet(samples.inputs.float(), samples.labels, samples.multipliers.float())
    gradient = weighted_gradient(build("conv").float(), single)
    assert {g.dtype for g in gradient.values()} == {torch.float32}
    exact = oracle(build("conv"), samples)
    for name, part in gradient.items():
        torch.testing.assert_close(part.double(), exact[name], rtol=1e-4, atol=1e-5)


# --- derivatives -------------------------------------------------------------------------------


def leaves(samples: SupportSet) -> tuple[Tensor, Tensor]:
    return (
        samples.inputs.clone().requires_grad_(),
        samples.multipliers.clone().requires_grad_(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_weighted_gradient_gradcheck_in_inputs_and_multipliers(kind, soft):
    model, samples = build(kind), candidates(2, soft=soft)
    direction = torch.randn(
        sum(p.numel() for p in model.parameters()),
        generator=torch.Generator().manual_seed(3),
        dtype=torch.float64,
    )

    def scalar(inputs: Tensor, multipliers: Tensor) -> Tensor:
        gradient = weighted_gradient(model, SupportSet(inputs, samples.labels, multipliers))
        return flat(gradient) @ direction

    assert gradcheck(scalar, leaves(samples), fast_mode=kind != "dense")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_deepkkt_loss_gradcheck_in_inputs_and_multipliers(kind, distance):
    model, samples = build(kind), candidates(3)
    with torch.no_grad():
        logits = model.eval()(samples.inputs)
        top = logits.topk(2, dim=1).values
        misses = (logits.argmax(dim=1) != samples.labels).sum()
    # the switch of the primal loss is a jump: both sides present, and none close to it
    assert (top[:, 0] - top[:, 1]).min() > 1e-3
    assert misses > 0

    def loss(inputs: Tensor, multipliers: Tensor) -> Tensor:
        candidate = SupportSet(inputs, samples.labels, multipliers)
        return deepkkt_loss(model, candidate, distance=distance, primal_weight=0.7)

    assert gradcheck(loss, leaves(samples), fast_mode=kind != "dense")


@pytest.mark.parametrize("distance", DISTANCES)
def test_deepkkt_derivative_equals_finite_differences_of_the_oracle(distance):
    """Not only self-consistent: the slow per-sample oracle has the same slope."""
    model, samples = build("dense"), candidates(3)

    def slow(inputs: Tensor, multipliers: Tensor) -> float:
        now = SupportSet(inputs, samples.labels, multipliers)
        return definition(model, now, distance, primal_weight=1.0)

    inputs, multipliers = leaves(samples)
    loss = deepkkt_loss(model, SupportSet(inputs, samples.labels, multipliers), distance=distance)
    slopes = torch.autograd.grad(loss, [inputs, multipliers])
    step = 1e-6
    for which, size in ((0, inputs.numel()), (1, 3)):
        for k in range(0, size, 5 if which == 0 else 1):
            ends = []
            for sign in (1, -1):
                moved = [samples.inputs.clone(), samples.multipliers.clone()]
                moved[which].view(-1)[k] += sign * step
                ends.append(slow(*moved))
            expected = (ends[0] - ends[1]) / (2 * step)
            assert float(slopes[which].reshape(-1)[k]) == pytest.approx(
                expected, rel=1e-5, abs=1e-8
            )


def definition(model: nn.Module, samples: SupportSet, distance: str, primal_weight: float) -> float:
    """β1·L_primal + D(θ, −g) written out in numpy from the oracle's gradient."""
    gradient = flat(oracle(model, samples)).detach().numpy()
    theta = flat(dict(model.named_parameters())).detach().numpy()
    stationarity = {
        "l1": np.abs(theta + gradient).mean(),
        "l2": ((theta + gradient) ** 2).mean(),
        "cosine": 1 + theta @ gradient / np.linalg.norm(theta) / np.linalg.norm(gradient),
    }[distance]
    with torch.no_grad():
        logits = model(samples.inputs)
        wrong = logits.argmax(dim=1) != samples.labels
        primal = (cross_entropy(logits, samples.labels) * wrong).sum() / len(samples)
    return float(primal_weight * primal + stationarity)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("primal_weight", [0.0, 1.0, 2.5])
def test_deepkkt_loss_is_primal_plus_stationarity(distance, primal_weight):
    model, samples = build("conv"), candidates(5)
    loss = deepkkt_loss(model, samples, distance=distance, primal_weight=primal_weight)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(
        definition(model, samples, distance, primal_weight), rel=1e-9
    )


def test_deepkkt_defaults_are_cosine_and_weight_one():
    model, samples = build("conv"), candidates(5)
    explicit = deepkkt_loss(model, samples, distance="cosine", primal_weight=1.0)
    assert torch.equal(deepkkt_loss(model, samples), explicit)


def test_primal_loss_is_zero_where_all_are_classified_as_labelled():
    model, samples = build("dense"), candidates(5)
    with torch.no_grad():
        samples = replace(samples, labels=model(samples.inputs).argmax(dim=1))
    assert torch.equal(
        deepkkt_loss(model, samples, primal_weight=100.0),
        deepkkt_loss(model, samples, primal_weight=0.0),
    )


def test_deepkkt_loss_over_a_parameter_subset():
    model, samples = build("conv"), candidates(4)
    params = {"5.weight": model[5].weight}
    gradient = oracle(model, samples)["5.weight"]
    expected = (model[5].weight + gradient).square().mean()
    loss = deepkkt_loss(model, samples, params=params, distance="l2", primal_weight=0)
    torch.testing.assert_close(loss, expected)


def test_deepkkt_loss_works_under_no_grad():
    model, samples = build("dense"), candidates(3)
    with torch.no_grad():
        assert torch.equal(deepkkt_loss(model, samples), deepkkt_loss(model, samples))


def test_cosine_of_a_vanishing_gradient_is_finite():
    model, samples = build("dense"), candidates(3)
    inputs = samples.inputs.clone().requires_grad_()
    off = SupportSet(inputs, samples.labels, torch.zeros(3, dtype=torch.float64))
    loss = deepkkt_loss(model, off, primal_weight=0)
    (slope,) = torch.autograd.grad(loss, inputs)
    assert loss.item() == 1
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("exponent", [0, -10, -20, -27, -30, -36])
def test_cosine_does_not_underflow(exponent):
    """In float32, squares of entries below 1e-23 are 0."""
    model, samples = build("dense").float(), candidates(3)
    size = 10.0**exponent
    samples = SupportSet(samples.inputs.float(), samples.labels, samples.multipliers.float())

    def small(logits: Tensor, labels: Tensor) -> Tensor:
        return size * cross_entropy(logits, labels)

    one = deepkkt_loss(model, samples, primal_weight=0)
    inputs, multipliers = leaves(samples)
    live = SupportSet(inputs, samples.labels, multipliers)
    loss = deepkkt_loss(model, live, loss_fn=small, primal_weight=0)
    assert float(loss) == pytest.approx(float(one), rel=1e-3)
    slopes = torch.autograd.grad(loss, [inputs, multipliers])
    wanted = torch.autograd.grad(deepkkt_loss(model, live, primal_weight=0), [inputs, multipliers])
    if exponent >= -30:
        for slope, expected in zip(slopes, wanted, strict=True):
            torch.testing.assert_close(slope, expected, rtol=1e-2, atol=1e-4)
    found, expected = (residuals(model, samples, loss_fn=f) for f in (small, None))
    assert found.cosine == pytest.approx(expected.cosine, rel=1e-3)
    if exponent >= -30:
        g = flat(weighted_gradient(model, samples, loss_fn=small))
        theta = flat(dict(model.named_parameters())).detach()
        own = flat(weighted_gradient(model, samples))
        assert best_scale(theta, g) * size == pytest.approx(best_scale(theta, own), rel=1e-3)


def test_cosine_of_large_numbers_does_not_overflow():
    theta, gradient = torch.full((4,), 1e25), torch.tensor([1e30, 1e30, 0.0, 0.0])
    assert float(distance(theta, gradient, "cosine")) == pytest.approx(1 + 0.5**0.5)


def test_single_logit_networks_by_a_loss_of_their_own():
    model, samples = nn.Sequential(nn.Flatten(), nn.Linear(32, 1)).double(), candidates(4)
    samples = replace(samples, labels=torch.tensor([0, 1, 1, 0]))

    def logistic(logits: Tensor, labels: Tensor) -> Tensor:
        return F.softplus(-(2.0 * labels - 1) * logits[:, 0])

    loss = deepkkt_loss(model, samples, loss_fn=logistic, distance="l2", primal_weight=1.0)
    scores = model(samples.inputs)[:, 0]
    losses = logistic(scores[:, None], samples.labels)
    pull = torch.autograd.grad(samples.multipliers @ losses, list(model.parameters()))
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    rest = theta + torch.cat([part.flatten() for part in pull])
    wrong = (scores > 0) != (samples.labels == 1)
    expected = (losses * wrong).mean() + rest.square().mean()
    torch.testing.assert_close(loss, expected)


# --- priors --------------------------------------------------------------------------------------


def test_total_variation_of_a_constant_is_zero():
    assert torch.equal(total_variation(torch.full((3, 2, 5, 4), 1.7)), torch.zeros(3))


def test_total_variation_of_a_small_image_by_hand():
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0], [5.0, 0.0, 1.0]])
    # down the columns (2+3) + (1+2) + (1+1), along the rows (1+2) + (0+0) + (5+1)
    assert total_variation(image.view(1, 1, 3, 3)).tolist() == [10 + 9]


def test_total_variation_adds_channels_and_keeps_images_apart(generator):
    inputs = torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    slow = []
    for image in inputs:
        total = 0.0
        for channel in image:
            for r in range(4):
                for s in range(5):
                    total += abs(float(channel[r, s] - channel[r - 1, s])) if r else 0
                    total += abs(float(channel[r, s] - channel[r, s - 1])) if s else 0
        slow.append(total)
    torch.testing.assert_close(total_variation(inputs), torch.tensor(slow, dtype=torch.float64))


def test_total_variation_scales_and_ignores_offsets(generator):
    inputs = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(total_variation(-3 * inputs + 7), 3 * total_variation(inputs))


def test_priors_gradcheck(generator):
    inputs = torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(total_variation, inputs)
    assert gradcheck(squared_norm, inputs)


def test_a_single_pixel_has_no_variation():
    assert total_variation(torch.ones(2, 3, 1, 1)).tolist() == [0, 0]


def test_squared_norm_is_a_mean_over_pixels():
    inputs = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 2.0]]]])
    assert squared_norm(inputs).tolist() == [7.5, 1.0]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"expected images \[n, C, H, W\], got shape \[3, 4\]"),
        (torch.zeros(1, 4, 4), ValueError, r"got shape \[1, 4, 4\]"),
        (torch.zeros(0, 1, 4, 4), ValueError, "expected at least one sample"),
        (torch.full((1, 1, 2, 2), torch.nan), ValueError, "expected finite numbers"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), TypeError, "got torch.uint8"),
        ([[0.0]], TypeError, "got list"),
    ],
)
def test_priors_refuse_what_is_no_image(inputs, error, message):
    with pytest.raises(error, match=message):
        total_variation(inputs)


# --- residuals ---------------------------------------------------------------------------------


def test_residuals_follow_their_definitions():
    model, samples = build("conv"), candidates(5)
    multipliers = torch.tensor([1.0, 0.0, 2.0, -0.25, 3.0], dtype=torch.float64)
    samples = replace(samples, multipliers=multipliers)
    gradient = oracle(model, samples)
    theta = flat(dict(model.named_parameters())).detach()
    total = flat(gradient)
    found = residuals(model, samples)
    assert found.stationarity == pytest.approx(float((theta + total).norm() / theta.norm()))
    assert found.cosine == pytest.approx(float(F.cosine_similarity(theta, -total, dim=0)))
    wrong = model(samples.inputs).argmax(dim=1) != samples.labels
    assert 0 < wrong.sum() < 5
    assert found.primal == pytest.approx(float(wrong.double().mean()))
    assert found.dual == -0.25
    assert found.active == pytest.approx(3 / 5)
    assert list(found.per_layer.columns) == ["parameter", "stationarity", "cosine"]
    assert list(found.per_layer["parameter"]) == list(gradient)
    for row in found.per_layer.itertuples():
        own, part = dict(model.named_parameters())[row.parameter].detach(), gradient[row.parameter]
        assert row.stationarity == pytest.approx(float((own + part).norm() / own.norm()))
        expected = F.cosine_similarity(own.reshape(-1), -part.reshape(-1), dim=0)
        assert row.cosine == pytest.approx(float(expected))


def test_residuals_of_non_negative_multipliers_have_no_dual_violation():
    assert residuals(build("dense"), candidates(3)).dual == 0


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_residuals_stream_over_batches(batch_size):
    model, samples = build("conv-batch").train(), candidates(7)
    whole, parts = residuals(model, samples), residuals(model, samples, batch_size=batch_size)
    for name in ("stationarity", "cosine", "primal", "dual", "active"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-10)
    np.testing.assert_allclose(
        parts.per_layer[["stationarity", "cosine"]], whole.per_layer[["stationarity", "cosine"]]
    )


def test_residuals_of_soft_labels_count_the_largest_entry():
    model, samples = build("dense"), candidates(6, soft=True)
    hard = replace(samples, labels=samples.hard_labels)
    assert residuals(model, samples).primal == residuals(model, hard).primal


def test_a_perfect_solution_has_residual_zero_and_cosine_one():
    """θ is set to −Σ λ∇L of a linear score, whose gradient does not depend on θ."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, CLASSES, bias=False)).double()
    samples = candidates(4)

    def score(logits: Tensor, labels: Tensor) -> Tensor:
        return -logits.gather(1, labels[:, None])[:, 0]

    gradient = weighted_gradient(model, samples, loss_fn=score)
    model[1].weight.data = -gradient["1.weight"]
    found = residuals(model, samples, loss_fn=score)
    assert found.stationarity == pytest.approx(0, abs=1e-12)
    assert found.cosine == pytest.approx(1)


# --- classical models whose multipliers are known ----------------------------------------------


def two_clouds(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    return rng.normal(size=(count, 4)) + 2.0 * (2 * labels - 1)[:, None], labels


def linear(weight: np.ndarray, bias: np.ndarray) -> nn.Module:
    model = nn.Linear(weight.shape[1], weight.shape[0]).double()
    model.weight.data, model.bias.data = torch.tensor(weight), torch.tensor(bias)
    return model


def binary_score(logits: Tensor, labels: Tensor) -> Tensor:
    return -(2.0 * labels - 1) * logits[:, 0]


@pytest.mark.parametrize("hardness", [0.05, 1e3])
def test_multipliers_of_a_linear_svm_meet_the_conditions(hardness):
    from sklearn.svm import SVC

    points, labels = two_clouds()
    svm = SVC(kernel="linear", C=hardness, tol=1e-10).fit(points, labels)
    model = linear(svm.coef_, svm.intercept_)
    multipliers = torch.zeros(len(points), dtype=torch.float64)
    multipliers[svm.support_] = torch.tensor(np.abs(svm.dual_coef_[0]))
    samples = SupportSet(torch.tensor(points), torch.tensor(labels), multipliers)
    found = residuals(model, samples, params={"weight": model.weight}, loss_fn=binary_score)
    assert found.stationarity <= 1e-6
    assert found.cosine == pytest.approx(1, abs=1e-9)
    assert found.dual == 0
    assert found.active == pytest.approx(len(svm.support_) / len(points))
    assert found.primal == pytest.approx(1 - svm.score(points, labels))
    assert list(found.per_layer["parameter"]) == ["weight"]
    # the bias is not penalised: its condition is Σ α y = 0
    bias = weighted_gradient(model, samples, params={"bias": model.bias}, loss_fn=binary_score)
    assert float(bias["bias"]) == pytest.approx(0, abs=1e-8)


def three_clouds() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = np.arange(60) % 3
    return rng.normal(size=(60, 4)) + 1.5 * np.eye(4)[labels], labels


@pytest.mark.parametrize("intercept", [False, True])
def test_softmax_regression_is_stationary_with_all_multipliers_c(intercept):
    from sklearn.linear_model import LogisticRegression

    points, labels = three_clouds()
    strength = 0.7
    fit = LogisticRegression(
        C=strength, fit_intercept=intercept, solver="newton-cg", tol=1e-12, max_iter=1000
    ).fit(points, labels)
    model = linear(fit.coef_, fit.intercept_ * np.ones(3))
    samples = SupportSet(
        torch.tensor(points), torch.tensor(labels), torch.full((60,), strength).double()
    )
    found = residuals(model, samples, params={"weight": model.weight})
    assert found.stationarity <= 1e-5
    assert found.cosine == pytest.approx(1, abs=1e-9)
    if intercept:
        bias = weighted_gradient(model, samples, params={"bias": model.bias})["bias"]
        torch.testing.assert_close(bias, torch.zeros_like(bias), rtol=0, atol=1e-5)
    # and with no other common multiplier
    other = replace(samples, multipliers=2 * samples.multipliers)
    assert residuals(model, other, params={"weight": model.weight}).stationarity > 0.1


# --- the model is read, never changed ------------------------------------------------------------

READERS = {
    "weighted_gradient": weighted_gradient,
    "residuals": residuals,
    "deepkkt_loss": deepkkt_loss,
}


def live(samples: SupportSet) -> SupportSet:
    inputs, multipliers = leaves(samples)
    return SupportSet(inputs, samples.labels, multipliers)


@pytest.mark.parametrize("name", READERS)
def test_model_is_untouched(name, untouched):
    model, samples = delicate(), live(candidates(4))
    with untouched(model):
        READERS[name](model, samples)
    assert samples.inputs.grad is None


def test_model_is_untouched_by_backward(untouched):
    model, samples = delicate(), live(candidates(4))
    with untouched(model):
        deepkkt_loss(model, samples).backward()
        flat(weighted_gradient(model, samples)).sum().backward()
    assert samples.inputs.grad is not None
    assert samples.multipliers.grad is not None


@pytest.mark.parametrize("name", READERS)
def test_model_is_untouched_after_an_error(name, untouched):
    model, samples = delicate(), candidates(4)
    with untouched(model), pytest.raises(ValueError, match="expected class numbers from 0 to 2"):
        READERS[name](model, replace(samples, labels=torch.tensor([0, 1, 2, 3])))
    with untouched(model), pytest.raises(ValueError, match="did you mean"):
        READERS[name](model, samples, params={"0.weigth": model[0].weight})


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, inputs: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("error", [KeyError("inside"), KeyboardInterrupt()])
def test_model_is_untouched_after_an_error_in_its_forward(name, error, untouched):
    model = delicate()
    model.append(Failing(error))
    with untouched(model), pytest.raises(type(error)):
        READERS[name](model, live(candidates(4)))


@pytest.mark.parametrize("name", READERS)
def test_model_in_training_mode_is_read_in_evaluation_mode(name):
    training, samples = delicate(), candidates(4)
    evaluating = delicate().eval()
    for first, second in ((training, training), (training, evaluating)):
        a, b = READERS[name](first, samples), READERS[name](second, samples)
        if name == "residuals":
            assert (a.stationarity, a.cosine) == (b.stationarity, b.cosine)
        elif name == "deepkkt_loss":
            assert torch.equal(a, b)
        else:
            assert_close(a, b)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_bad_input_says_expected_got_and_the_fix(name):
    function, model, samples = READERS[name], build("conv"), candidates(4)
    cases = [
        (replace(samples, inputs=torch.randn(4, 3, 4, 4).double()), "expected a shape that"),
        (replace(samples, inputs=samples.inputs.float()), "expected torch.float64.*float32"),
        (replace(samples, multipliers=samples.multipliers.float()), "expected torch.float64"),
        (replace(samples, labels=torch.tensor([-1, 0, 1, 2])), "0 to 2, got -1"),
        (replace(samples, labels=torch.full((4, 5), 0.2)), "3 classes, got 5 columns"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            function(model, wrong)
        assert "expected" in str(caught.value)
        assert "got" in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_bad_params_are_refused(name):
    function, model, samples = READERS[name], build("conv"), candidates(4)
    with pytest.raises(ValueError, match=r"\[3, 16\], got \[16, 3\]"):
        function(model, samples, params={"5.weight": model[5].weight.T})
    with pytest.raises(ValueError, match="at least one parameter that requires grad"):
        function(model.requires_grad_(False), samples)
    with pytest.raises(ValueError, match="at least one parameter that requires grad"):
        function(nn.Flatten(), samples)


def test_logits_must_be_one_row_per_sample():
    model = nn.Sequential(nn.Conv2d(2, 3, 3)).double()
    with pytest.raises(ValueError, match=r"expected logits \[n, K\] for 4 inputs"):
        weighted_gradient(model, candidates(4))


def test_unknown_distance_and_weights_are_refused():
    model, samples = build("dense"), candidates(3)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        deepkkt_loss(model, samples, distance="cosin")
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="primal_weight: expected a finite number ≥ 0"):
            deepkkt_loss(model, samples, primal_weight=weight)
    with pytest.raises(TypeError, match="primal_weight"):
        deepkkt_loss(model, samples, primal_weight="1")
    with pytest.raises(ValueError, match="batch_size"):
        residuals(model, samples, batch_size=0)


def test_candidates_have_the_shape_the_tests_assume():
    assert tuple(candidates(4).inputs.shape) == (4, *SHAPE)


def test_the_best_scale_is_that_of_least_squares_and_zero_without_a_gradient():
    generator = torch.Generator().manual_seed(4)
    theta, gradient = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    expected = np.linalg.lstsq(gradient[:, None].numpy(), -theta.numpy(), rcond=None)[0][0]
    assert best_scale(theta, gradient) == pytest.approx(expected)
    assert best_scale(theta, torch.zeros_like(theta)) == 0.0


def test_a_layer_without_weights_or_without_gradient_has_no_cosine():
    """θ = 0: no relative residual either; g = 0: the residual is ‖θ‖ / ‖θ‖ = 1."""
    model, samples = build("dense"), candidates()
    torch.nn.init.zeros_(model[1].bias)
    model.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))
    rows = residuals(model, samples).per_layer.set_index("parameter")
    assert rows.loc["1.bias"].isna().all()
    assert rows.loc["unused", "stationarity"] == 1
    assert np.isnan(rows.loc["unused", "cosine"])
    assert rows.loc[["1.weight", "3.weight", "3.bias"]].notna().all(axis=None)


def test_the_sum_of_gradients_has_slopes_where_the_multipliers_alone_want_them():
    """The derivative of Σ λᵢ gᵢ in λᵢ is gᵢ."""
    model, samples = build("dense"), candidates()
    weights = samples.multipliers.clone().requires_grad_()
    found = weighted_gradient(model, replace(samples, multipliers=weights))
    direction = torch.linspace(-1, 1, len(flat(found)), dtype=torch.float64)
    (slopes,) = torch.autograd.grad(flat(found) @ direction, weights)
    for i, slope in enumerate(slopes):
        unit = torch.zeros_like(samples.multipliers)
        unit[i] = 1
        own = flat(oracle(model, replace(samples, multipliers=unit)))
        torch.testing.assert_close(slope, own @ direction)


def test_a_network_that_writes_into_its_weights_keeps_them(untouched):
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("dense")

        def forward(self, inputs: Tensor) -> Tensor:
            self.inner[1].weight.data.clamp_(-0.1, 0.1)
            return self.inner(inputs)

    model = Clamps()
    with untouched(model):
        weighted_gradient(model, candidates())
