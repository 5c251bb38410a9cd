"""Multipliers: the convex problem against SciPy and scikit-learn, the paper's way by autograd."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import CLASSES, Gain, build, candidates, delicate, sample_gradients
from scipy.optimize import lsq_linear, nnls
from torch import nn

from dsvlib import (
    GradientConfig,
    NNLSConfig,
    Status,
    SupportSet,
    fit_multipliers,
    residuals,
    weighted_gradient,
)
from dsvlib.conditions import DISTANCES, Conditions
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import SampleGradients
from dsvlib.logits import cross_entropy, entropy
from dsvlib.multipliers import _distance


def fit(model, samples, **options):
    return fit_multipliers(model, samples.inputs, samples.labels, **options)


# --- the convex problem --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "conv", "conv-group", "conv-batch"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_nnls_equals_scipy_on_the_gradients(kind, soft, untouched):
    model, samples = build(kind), candidates(12, soft=soft)
    theta, gradients = sample_gradients(model, samples)
    assert np.linalg.matrix_rank(gradients) == 12  # full column rank: λ itself can be compared
    expected, norm = nnls(gradients.T, -theta)
    with untouched(model):
        solution = fit(model, samples)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.samples.multipliers.numpy(), expected, atol=1e-9)
    assert solution.residuals.stationarity == pytest.approx(norm / np.linalg.norm(theta), abs=1e-10)


def test_certificate_holds_and_says_what_it_measures():
    model, samples = build("conv"), candidates(20)
    solution = fit(model, samples)
    theta, gradients = sample_gradients(model, samples)
    proof, table = solution.certificate, solution.certificate.per_sample
    multipliers = solution.samples.multipliers.numpy()
    rest = theta + gradients.T @ multipliers
    norms, size = np.linalg.norm(gradients, axis=1), np.linalg.norm(theta)
    assert proof.satisfied
    assert proof.unique
    assert proof.rank == 20
    assert proof.multiplier_min == 0
    assert proof.gradient_min >= -1e-12
    assert proof.gap < 1e-12
    assert proof.complementarity < 1e-12
    assert proof.active == (multipliers > 0).mean()
    assert proof.stationarity == pytest.approx(np.linalg.norm(rest) / size)
    np.testing.assert_allclose(table["gradient_norm"], norms)
    np.testing.assert_allclose(table["contribution"], multipliers * norms)
    np.testing.assert_allclose(
        table["reduced_gradient"], gradients @ rest / norms / size, atol=1e-9
    )
    assert table["label"].tolist() == samples.labels.tolist()
    values = proof.table().set_index("quantity")["value"]
    assert values["gap"] == proof.gap
    assert "per_sample" not in values.index


def test_certificate_sees_a_wrong_answer(monkeypatch):
    monkeypatch.setattr("dsvlib._box_quadratic._exchange", lambda *args: np.ones(6))
    solution = fit(build("dense"), candidates(6))
    assert solution.status is Status.NOT_OPTIMAL
    assert not solution.status.successful
    assert not solution.certificate.satisfied
    assert solution.certificate.violation > 1e-3


def test_upper_bound_equals_scipy():
    model, samples = build("conv"), candidates(20)
    theta, gradients = sample_gradients(model, samples)
    free = fit(model, samples).samples.multipliers
    upper = float(free.max()) / 3
    solution = fit(model, samples, config=NNLSConfig(upper=upper))
    expected = lsq_linear(gradients.T, -theta, (0, upper), method="bvls", tol=1e-14).x
    np.testing.assert_allclose(solution.samples.multipliers.numpy(), expected, atol=1e-8)
    assert solution.status is Status.OPTIMAL
    assert solution.certificate.at_bound > 0
    assert float(solution.samples.multipliers.max()) == upper


def test_the_exchange_solves_from_nothing(monkeypatch):
    """SciPy's iteration limit is no dead end."""

    def gives_up(*_):
        raise RuntimeError("Maximum number of iterations reached.")

    model, samples = build("conv"), candidates(20)
    expected = fit(model, samples).samples.multipliers
    monkeypatch.setattr("scipy.optimize.nnls", gives_up)
    solution = fit(model, samples)
    assert solution.status is Status.OPTIMAL
    torch.testing.assert_close(solution.samples.multipliers, expected)


def test_ridge_adds_to_the_gram_matrix():
    model, samples = build("dense"), candidates(9)
    theta, gradients = sample_gradients(model, samples)
    ridge = 0.1 * (gradients**2).sum(axis=1).mean()
    stacked = np.vstack([gradients.T, np.sqrt(ridge) * np.eye(9)])
    expected, _ = nnls(stacked, np.concatenate([-theta, np.zeros(9)]))
    solution = fit(model, samples, config=NNLSConfig(ridge=0.1))
    np.testing.assert_allclose(solution.samples.multipliers.numpy(), expected, atol=1e-9)
    assert solution.certificate.satisfied


def test_dependent_gradients_give_one_of_many_solutions_and_say_so():
    model, once = build("dense"), candidates(6)
    twice = SupportSet(
        torch.cat([once.inputs] * 2),
        torch.cat([once.labels] * 2),
        torch.cat([once.multipliers] * 2),
    )
    single, double = fit(model, once), fit(model, twice)
    assert single.certificate.unique
    assert not double.certificate.unique
    assert double.status is Status.OPTIMAL
    assert double.certificate.rank == 6
    assert double.residuals.stationarity == pytest.approx(single.residuals.stationarity)
    both = double.samples.multipliers.view(2, 6)
    torch.testing.assert_close(both.sum(dim=0), single.samples.multipliers)
    assert not bool((both > 0).all(dim=0).any())  # a basic solution: no copy beside its twin
    bounded = fit(model, twice, config=NNLSConfig(upper=float(both.max()) * 0.7))
    assert bounded.certificate.satisfied


def test_more_samples_than_parameters():
    model, samples = build("dense"), candidates(40)
    params = {name: p for name, p in model.named_parameters() if name == "3.bias"}
    solution = fit(model, samples, params=params)
    assert solution.certificate.satisfied
    assert solution.certificate.rank <= 3
    assert int((solution.samples.multipliers > 0).sum()) <= 3


def test_ill_conditioned_gram_matrix():
    """Nearly equal samples and gradients over many orders of magnitude still end in a proof."""
    model, base = build("dense"), candidates(12)
    with torch.no_grad():
        model[3].weight.mul_(6)  # confident: losses from 1e-9 to 10
    inputs = torch.cat([base.inputs, base.inputs + 1e-7])
    solution = fit_multipliers(model, inputs, torch.cat([base.labels] * 2))
    assert solution.certificate.condition > 1e10
    assert solution.certificate.violation < 1e-6
    assert torch.isfinite(solution.samples.multipliers).all()


# --- oracles from convex models ------------------------------------------------------------------


class Score(nn.Module):
    """f(x) = w·x + b with one logit."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64).reshape(-1))
        self.bias = nn.Parameter(torch.as_tensor(bias, dtype=torch.float64).reshape(1))

    def forward(self, inputs):
        return (inputs @ self.weight + self.bias)[:, None]


def signed(labels):
    return 2.0 * labels - 1


def linear_loss(logits, labels):
    """−y·f(x), whose gradient in w is −y·x wherever x lies."""
    return -signed(labels) * logits[:, 0]


def hinge(logits, labels):
    """max(0, 1 − y·f(x)), flat just beyond the margin: complementary slackness as a loss."""
    return torch.relu(1 + 1e-6 - signed(labels) * logits[:, 0])


def machine(dimension, *, seed, cost=1e4):
    """Return separable data, its SVM, and the dual coefficients of all samples."""
    from sklearn.svm import SVC

    rng = np.random.default_rng(seed)
    labels = np.arange(40) % 2
    points = rng.standard_normal((40, dimension)) + 2.5 * signed(labels)[:, None]
    svm = SVC(kernel="linear", C=cost, tol=1e-12).fit(points, labels)
    dual = np.zeros(40)
    dual[svm.support_] = np.abs(svm.dual_coef_[0])
    return torch.as_tensor(points), torch.as_tensor(labels), svm, torch.as_tensor(dual)


def test_residual_of_a_support_vector_machine_is_zero():
    points, labels, svm, dual = machine(5, seed=0)
    model = Score(svm.coef_[0], svm.intercept_)
    weight = {"weight": model.weight}
    measured = residuals(
        model, SupportSet(points, labels, dual), params=weight, loss_fn=linear_loss
    )
    assert measured.stationarity <= 1e-6
    assert measured.cosine == pytest.approx(1)
    assert measured.primal == 0


def test_nnls_finds_the_support_vectors_of_a_machine():
    """With slackness in the loss, λ are the dual coefficients and the active ones `support_`.

    The loss −y·f(x) alone would not do: its conditions leave out complementary slackness, and with
    more samples than dimensions many λ ≥ 0 give the same w. The hinge is flat beyond the margin, so
    that samples there have no gradient and no multiplier; the rest are independent here.
    """
    points, labels, svm, dual = machine(5, seed=0)
    model = Score(svm.coef_[0], svm.intercept_)
    solution = fit_multipliers(
        model, points, labels, params={"weight": model.weight}, loss_fn=hinge
    )
    assert solution.status is Status.OPTIMAL
    assert solution.certificate.unique
    assert solution.residuals.stationarity <= 1e-6
    active = torch.nonzero(solution.samples.multipliers)[:, 0]
    assert active.tolist() == sorted(svm.support_)
    torch.testing.assert_close(solution.samples.multipliers, dual, rtol=1e-4, atol=1e-6)


def test_nnls_meets_both_conditions_of_a_machine_in_the_plane():
    """Three support vectors in two dimensions: unique only with Σ αy = 0, the bias's condition.

    The bias is not penalised, so its entry of θ has to be 0: shift the data until it is.
    """
    for seed in range(20):
        points, labels, svm, dual = machine(2, seed=seed)
        if len(svm.support_) == 3:
            break
    weight, bias = torch.tensor(svm.coef_[0]), float(svm.intercept_[0])
    shifted = points + bias * weight / weight.square().sum()
    solution = fit_multipliers(Score(weight.numpy(), 0.0), shifted, labels, loss_fn=hinge)
    assert torch.nonzero(solution.samples.multipliers)[:, 0].tolist() == sorted(svm.support_)
    torch.testing.assert_close(solution.samples.multipliers, dual, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def softmax_regression():
    """Regularised softmax regression at its optimum: θ = −C Σ ∇L."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    points = rng.standard_normal((90, 40)) + 0.7 * np.eye(3, 40)[labels]
    fitted = LogisticRegression(C=0.7, fit_intercept=False, tol=1e-12, max_iter=10_000)
    fitted.fit(points, labels)
    model = nn.Linear(40, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(fitted.coef_))
    return model, torch.as_tensor(points), torch.as_tensor(labels)


def test_softmax_regression_is_stationary_with_equal_multipliers(softmax_regression):
    model, points, labels = softmax_regression
    equal = SupportSet(points, labels, torch.full((90,), 0.7, dtype=torch.float64))
    assert residuals(model, equal).stationarity < 1e-5


def test_nnls_explains_softmax_regression_whole(softmax_regression):
    model, points, labels = softmax_regression
    solution = fit_multipliers(model, points, labels)
    assert solution.residuals.stationarity < 1e-5
    # 90 gradients in 80 dimensions (rows of W sum to 0): C is one solution of many, ours is sparse
    assert not solution.certificate.unique
    assert solution.certificate.rank == 80
    assert solution.certificate.active <= 80 / 90


def test_equal_multipliers_are_the_only_ones_where_gradients_are_independent(softmax_regression):
    from sklearn.linear_model import LogisticRegression

    _, points, labels = softmax_regression
    points, labels = points[:30], labels[:30]
    fitted = LogisticRegression(C=0.7, fit_intercept=False, tol=1e-13, max_iter=10_000)
    fitted.fit(points, labels)
    model = nn.Linear(40, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(fitted.coef_))
    solution = fit_multipliers(model, points, labels)
    assert solution.certificate.unique
    torch.testing.assert_close(
        solution.samples.multipliers, torch.full((30,), 0.7).double(), rtol=1e-3, atol=0
    )


# --- the paper's way -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("network", ["dense", "conv-group", "conv-batch"])
def test_directional_derivative_is_the_gradient_in_the_multipliers(network, kind):
    model, samples = build(network), candidates(7)
    gradients = SampleGradients(model, samples.inputs, samples.labels, batch_size=3)
    with evaluation_mode(model):
        total = gradients.weighted_sum(samples.multipliers)
        _, direction = _distance(gradients.theta, total, kind)
        streamed = gradients.directional(direction)
        multipliers = samples.multipliers.clone().requires_grad_()
        terms = Conditions(model).terms(samples.inputs, samples.labels, multipliers, kind)
        (expected,) = torch.autograd.grad(terms.stationarity, multipliers)
    torch.testing.assert_close(streamed, expected)


@pytest.mark.parametrize("kind", DISTANCES)
def test_batches_change_nothing(kind, untouched):
    model, samples = build("conv"), candidates(10)
    config = GradientConfig(steps=15, distance=kind, batch_size=3, memory=0)
    with untouched(model):
        small = fit(model, samples, method="gradient", config=config)
    for change in ({"batch_size": 10}, {"memory": 1.0}):
        other = dataclasses.replace(config, **change)
        whole = fit(model, samples, method="gradient", config=other)
        torch.testing.assert_close(small.samples.multipliers, whole.samples.multipliers)
        np.testing.assert_allclose(small.history, whole.history, rtol=1e-8)


def reference(theta, gradients, config):
    """The paper's fit in the open: Adam's formulas on λ / unit, D by autograd, G as a matrix."""
    total = gradients.sum(axis=0)
    unit = -(total @ theta) / (total @ total)
    unit = unit if unit > 0 else 1.0
    scaled = torch.ones(len(gradients)).double()
    if config.start == "random":
        scaled = 2 * torch.rand(len(gradients), generator=torch.Generator().manual_seed(0)).double()
    theta, gradients = torch.tensor(theta), torch.tensor(gradients)
    first, second = torch.zeros_like(scaled), torch.zeros_like(scaled)
    alive = torch.ones_like(scaled)
    path = [unit * scaled]
    for step in range(config.steps):
        leaf = scaled.clone().requires_grad_()
        rest = theta + (unit * leaf) @ gradients
        value = {
            "l1": rest.abs().mean(),
            "l2": rest.square().mean(),
            "cosine": 1 + theta @ (rest - theta) / theta.norm() / (rest - theta).norm(),
        }[config.distance]
        slope = torch.autograd.grad(value, leaf)[0] * alive
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        rate = config.learning_rate
        if config.schedule == "cosine":
            rate *= (1 + np.cos(np.pi * step / config.steps)) / 2
        down = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-20
        scaled = scaled - rate * first / (1 - 0.9 ** (step + 1)) / down
        if config.negative_multiplier == "remove":
            alive = alive * (scaled >= 0)
            scaled = scaled * alive
        scaled = scaled.clamp(min=0)
        path.append(unit * scaled)
    return torch.stack(path)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("rule", ["clamp", "remove"])
@pytest.mark.parametrize("start", ["equal", "random"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_fit_is_the_one_written_out(kind, rule, start, schedule):
    model, samples = build("dense"), candidates(12)
    config = GradientConfig(
        steps=12,
        learning_rate=0.3,
        distance=kind,
        negative_multiplier=rule,
        start=start,
        schedule=schedule,
    )
    expected = reference(*sample_gradients(model, samples), config)
    path = []
    fit(model, samples, method="gradient", config=config, on_step=lambda _, x: path.append(x))
    torch.testing.assert_close(torch.stack(path), expected)
    assert float(expected.min()) == 0 or kind == "l1"  # the rule had something to do


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("rule", ["clamp", "remove"])
@pytest.mark.parametrize("start", ["equal", "random"])
def test_every_step_is_shown(kind, rule, start):
    """Each λ on the way is what a fit of as many steps at a constant rate ends with."""
    model, samples = build("dense"), candidates(12)
    config = GradientConfig(
        steps=10,
        learning_rate=0.3,
        schedule="constant",
        distance=kind,
        negative_multiplier=rule,
        start=start,
        log_every=1,
    )
    path, numbers = [], []

    def keep(step, multipliers):
        numbers.append(step)
        path.append(multipliers)

    whole = fit(model, samples, method="gradient", config=config, on_step=keep)
    assert numbers == list(range(11))
    assert bool((torch.stack(path) >= 0).all())
    assert whole.history["distance"].iloc[-1] < whole.history["distance"].iloc[0]
    for steps in (3, 10):
        short = fit(
            model, samples, method="gradient", config=dataclasses.replace(config, steps=steps)
        ).samples.multipliers
        last = path[steps]
        if kind == "cosine":  # blind to the scale, which the fit sets at the end
            last, short = last / last.norm(), short / short.norm()
        torch.testing.assert_close(last, short)


def test_gradient_steps_reach_the_optimum_of_the_convex_problem():
    """Both the squared distance and the cosine are best at the projection on the cone."""
    model, samples = build("conv"), candidates(10)
    exact = fit(model, samples)
    for kind in ("l2", "cosine"):
        config = GradientConfig(steps=200, learning_rate=0.2, distance=kind)
        steps = fit(model, samples, method="gradient", config=config)
        assert steps.status is Status.ALL_STEPS
        assert steps.certificate is None
        assert steps.residuals.stationarity == pytest.approx(exact.residuals.stationarity, abs=1e-3)
        assert steps.residuals.cosine == pytest.approx(exact.residuals.cosine, abs=1e-3)


def test_history_and_final_scale():
    model, samples = build("conv"), candidates(8)
    config = GradientConfig(steps=25, log_every=10)
    solution = fit(model, samples, method="gradient", config=config)
    assert solution.history["step"].tolist() == [0, 10, 20, 25]
    assert solution.history["distance"].is_monotonic_decreasing
    multipliers = solution.samples.multipliers
    with torch.no_grad():
        weights = entropy(model(samples.inputs))
    last = solution.history.iloc[-1]
    assert last["multiplier_sum"] == pytest.approx(float(multipliers.sum()))
    assert last["entropy"] == pytest.approx(float(multipliers @ weights / multipliers.sum()))
    assert last["distance"] == pytest.approx(1 - solution.residuals.cosine)
    # the scale that the cosine cannot see is the best one: the rest is orthogonal to the fit
    expected = np.sqrt(1 - solution.residuals.cosine**2)
    assert solution.residuals.stationarity == pytest.approx(expected)


def test_warm_start_and_convergence():
    model, samples = build("conv"), candidates(10)
    exact = fit(model, samples)
    config = GradientConfig(steps=50, learning_rate=1e-6, log_every=1, tolerance=1e-3)
    warm = fit(
        model, samples, method="gradient", config=config, init=exact.samples.multipliers + 1e-9
    )
    assert warm.status is Status.CONVERGED
    assert warm.history["step"].tolist() == [0, 1]
    torch.testing.assert_close(
        warm.samples.multipliers, exact.samples.multipliers, rtol=1e-3, atol=1e-3
    )


def test_one_sample_gets_the_multiplier_of_the_exact_problem():
    """The cosine cannot see the scale of a single λ: its slope is rounding."""
    model = build("conv")
    for label in range(CLASSES):
        one = dataclasses.replace(candidates(1), labels=torch.tensor([label]))
        exact = fit(model, one)
        for kind in DISTANCES:
            config = GradientConfig(steps=400, distance=kind, learning_rate=0.05)
            solution = fit(model, one, method="gradient", config=config)
            assert solution.status is Status.ALL_STEPS
            if kind != "l1":
                torch.testing.assert_close(
                    solution.samples.multipliers, exact.samples.multipliers, rtol=1e-3, atol=1e-6
                )


def test_an_exact_start_is_kept():
    """Softmax regression at its optimum: equal multipliers are a point without slope."""
    torch.manual_seed(0)
    points, labels = torch.randn(8, 5).double(), torch.arange(8) % CLASSES
    model = nn.Linear(5, CLASSES, bias=False).double()
    samples = SupportSet(points, labels, torch.full((8,), 0.7).double())
    for _ in range(500):  # θ = −Σ λ∇L(θ) by damped substitution
        pull = weighted_gradient(model, samples)["weight"]
        model.weight.data = 0.8 * model.weight.data - 0.2 * pull
    assert residuals(model, samples).stationarity < 1e-12
    for kind in ("l2", "cosine"):
        config = GradientConfig(steps=1, learning_rate=1e-9, distance=kind)
        solution = fit(model, samples, method="gradient", config=config, init=samples.multipliers)
        assert solution.status is Status.ALL_STEPS
        torch.testing.assert_close(solution.samples.multipliers, samples.multipliers)


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_a_slope_of_zero_is_no_lack_of_gradients(memory):
    """Two gradients at right angles to θ that cancel: exactly flat at equal λ, and a minimum."""
    model = Score([1.0, 0.0], 0.0)
    solution = fit_multipliers(
        model,
        torch.tensor([[0.0, 1.0], [0.0, -1.0]]).double(),
        [1, 1],
        method="gradient",
        params={"weight": model.weight},
        loss_fn=linear_loss,
        config=GradientConfig(steps=5, distance="l2", memory=memory),
        init=torch.tensor([2.0, 2.0]),
    )
    assert solution.status is Status.ALL_STEPS
    assert solution.samples.multipliers.tolist() == [2, 2]


def test_no_scale_fits_where_every_gradient_points_along_theta():
    model = Score([1.0, 0.0], 0.0)
    points = torch.tensor([[1.0, 0.5], [2.0, -1.0]]).double()
    solution = fit_multipliers(
        model,
        points,
        [0, 0],
        method="gradient",
        params={"weight": model.weight},
        loss_fn=linear_loss,
        config=GradientConfig(steps=5),
    )
    assert solution.samples.multipliers.tolist() == [0, 0]
    assert solution.residuals.stationarity == 1
    assert solution.history["multiplier_sum"].iloc[-1] == 0


def test_a_confident_sample_moves_as_far_as_the_others():
    """Adam divides by the size of a derivative: its ε has to be smaller than any of them."""
    model, samples = build("dense"), candidates(6)

    def loss(logits, labels):
        weight = torch.where(labels >= CLASSES, 1e-10, 1.0).to(logits.dtype)
        return weight * cross_entropy(logits, labels % CLASSES)

    path = []
    fit_multipliers(
        model,
        samples.inputs,
        samples.labels + CLASSES * (torch.arange(6) == 4),
        method="gradient",
        loss_fn=loss,
        config=GradientConfig(steps=1, distance="l2"),
        on_step=lambda _, multipliers: path.append(multipliers),
    )
    moved = (path[1] - path[0]).abs() / path[0]
    torch.testing.assert_close(moved, torch.full((6,), 0.1).double())


def test_removed_samples_stay_out_and_in_place():
    model, samples = build("conv"), candidates(12)
    config = GradientConfig(steps=60, learning_rate=0.2, negative_multiplier="remove")
    solution = fit(model, samples, method="gradient", config=config)
    assert len(solution.samples) == 12
    assert 0 < solution.residuals.active < 1
    actives = solution.history["active"]
    assert actives.is_monotonic_decreasing  # none comes back
    assert float(solution.samples.multipliers.min()) == 0


def test_every_sample_removed():
    """A gradient along +θ drives its only λ below zero at once."""
    model = Score([1.0, 0.0], 0.0)
    config = GradientConfig(steps=9, learning_rate=5.0, negative_multiplier="remove", distance="l2")
    solution = fit_multipliers(
        model,
        torch.tensor([[1.0, 0.5]]).double(),
        [0],
        method="gradient",
        params={"weight": model.weight},
        loss_fn=linear_loss,
        config=config,
    )
    assert solution.status is Status.NO_CANDIDATES
    assert not solution.status.successful
    assert solution.samples.multipliers.tolist() == [1]  # the last one before it turned


def test_random_start_follows_the_generator():
    model, samples = build("conv"), candidates(6)
    config = GradientConfig(steps=1, learning_rate=1e-9, start="random", distance="l2")
    runs = [
        fit(
            model,
            samples,
            method="gradient",
            config=config,
            generator=torch.Generator().manual_seed(seed),
        ).samples.multipliers
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])


# --- both ----------------------------------------------------------------------------------------

METHODS = {"nnls": NNLSConfig(), "gradient": GradientConfig(steps=5)}
both = pytest.mark.parametrize("method", METHODS)


@both
def test_order_of_the_samples_does_not_matter(method):
    model, samples = build("conv"), candidates(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    plain = fit(model, samples, method=method, config=METHODS[method])
    shuffled = fit(model, samples[order], method=method, config=METHODS[method])
    torch.testing.assert_close(shuffled.samples.multipliers, plain.samples.multipliers[order])


@both
def test_delicate_models_are_left_alone(method, untouched):
    model, samples = delicate(), candidates(6)
    with untouched(model):
        solution = fit(model, samples, method=method, config=METHODS[method])
    assert torch.isfinite(solution.samples.multipliers).all()
    with untouched(model), pytest.raises(ValueError, match="labels"):
        fit_multipliers(model, samples.inputs, samples.labels + 5, method=method)


@both
@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_big_architectures_can_be_transformed(method, name):
    from dsvlib import build_model

    torch.manual_seed(0)
    options = {"width": 8, "depth": 1, "heads": 2} if name == "vit" else {}
    model = build_model(name, num_classes=3, shape=(3, 8, 8), **options)
    last = dict(list(model.named_parameters())[-4:])
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(METHODS[method], batch_size=3)
    solution = fit_multipliers(
        model, inputs, [0, 1, 2, 0], method=method, params=last, config=config
    )
    assert solution.status.successful
    assert solution.samples.multipliers.dtype == torch.float32


@both
def test_vanishing_gradients_have_a_status(method):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    solution = fit(
        model,
        candidates(4),
        method=method,
        loss_fn=lambda logits, labels: torch.relu(logits.sum(dim=1) * 0),
    )
    assert solution.status is Status.NO_GRADIENTS
    assert not solution.status.successful
    assert solution.samples.multipliers.tolist() == [0, 0, 0, 0]
    assert np.isnan(solution.history["entropy"].iloc[0])
    if method == "nnls":
        assert solution.certificate.rank == 0
        assert solution.certificate.active == 0


def test_a_sample_without_gradient_gets_no_multiplier():
    model, samples = build("dense"), candidates(6)
    silent = torch.tensor([1.0, 1, 0, 1, 1, 1]).double()

    def loss(logits, labels):
        # one sample is told apart by its label, as custom losses may code them as they like
        return cross_entropy(logits, labels % CLASSES) * silent[labels // CLASSES]

    labels = samples.labels + CLASSES * torch.arange(6)
    solution = fit_multipliers(model, samples.inputs, labels, loss_fn=loss)
    assert solution.status is Status.OPTIMAL
    assert float(solution.samples.multipliers[2]) == 0
    assert solution.certificate.per_sample["gradient_norm"][2] == 0


def test_no_gradient_along_theta_makes_zero_the_optimum():
    model = Score([1.0, 0.0], 0.0)
    points = torch.tensor([[1.0, 0.5], [2.0, -1.0]]).double()
    solution = fit_multipliers(
        model, points, [0, 0], params={"weight": model.weight}, loss_fn=linear_loss
    )
    assert solution.status is Status.OPTIMAL
    assert solution.certificate.active == 0
    assert solution.residuals.stationarity == 1


def kink(logits, labels):
    """A loss that is finite at 0 while its derivative is not."""
    return (logits[:, 0] - logits[:, 0]).abs().sqrt() + 0 * labels


def test_gradients_that_are_not_finite():
    model, samples = build("dense"), candidates(3)
    with pytest.raises(ValueError, match="finite parameter gradients, got NaN or infinite ones"):
        fit(model, samples, loss_fn=kink)
    solution = fit(model, samples, method="gradient", loss_fn=kink)
    assert solution.status is Status.NON_FINITE
    assert torch.isfinite(solution.samples.multipliers).all()


BAD_CALLS = {
    "method": ({"method": "newton"}, ValueError, "one of 'nnls', 'gradient'"),
    "config": ({"config": GradientConfig()}, TypeError, "NNLSConfig for method 'nnls'"),
    "other config": (
        {"config": NNLSConfig(), "method": "gradient"},
        TypeError,
        "expected GradientConfig",
    ),
    "start of a convex problem": ({"init": torch.ones(4)}, ValueError, "expected None for method"),
    "start of wrong length": (
        {"init": torch.ones(3), "method": "gradient"},
        ValueError,
        r"shape \[4\].*got \[3\]",
    ),
    "negative start": ({"init": -torch.ones(4), "method": "gradient"}, ValueError, "≥ 0"),
    "start of zeros": ({"init": torch.zeros(4), "method": "gradient"}, ValueError, "not all 0"),
    "start of NaN": (
        {"init": torch.full((4,), torch.nan), "method": "gradient"},
        ValueError,
        "init: expected finite",
    ),
    "parameter": ({"params": {"2.weight": torch.ones(1)}}, ValueError, "names of the model"),
    "reduced loss": (
        {"loss_fn": lambda logits, labels: logits.mean()},
        ValueError,
        "one loss per sample",
    ),
    "infinite loss": (
        {"loss_fn": lambda logits, labels: logits[:, 0] / 0},
        ValueError,
        "losses of the samples",
    ),
    "memory for K": ({"config": NNLSConfig(memory=1e-9)}, ValueError, "for the Gram matrix of 4"),
    "memory for G": ({"config": NNLSConfig(memory=1e-6)}, ValueError, "room for at least 4"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(options, error, message, untouched):
    model = build("dense")
    with untouched(model), pytest.raises(error, match=message):
        fit(model, candidates(4), **options)


def test_bad_samples():
    model, samples = build("dense"), candidates(4)
    with pytest.raises(ValueError, match="inputs 4, labels 3"):
        fit_multipliers(model, samples.inputs, samples.labels[:3])
    with pytest.raises(ValueError, match="class numbers from 0 to 2, got 7"):
        fit_multipliers(model, samples.inputs, [0, 1, 7, 2])
    with pytest.raises(ValueError, match="finite numbers"):
        fit_multipliers(model, samples.inputs * torch.nan, samples.labels)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    with pytest.raises(ValueError, match="not all zero"):
        fit(model, samples)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (NNLSConfig, {"upper": 0.0}),
        (NNLSConfig, {"ridge": -1.0}),
        (NNLSConfig, {"tolerance": 0.0}),
        (NNLSConfig, {"memory": 0}),
        (NNLSConfig, {"batch_size": 0}),
        (GradientConfig, {"distance": "l3"}),
        (GradientConfig, {"negative_multiplier": "keep"}),
        (GradientConfig, {"schedule": "halfway"}),
        (GradientConfig, {"start": "zero"}),
        (GradientConfig, {"steps": 0}),
        (GradientConfig, {"learning_rate": 0.0}),
    ],
)
def test_bad_configurations(make, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


def test_unused_parameters_have_gradient_zero():
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3), Gain()).double()
    theta, gradients = sample_gradients(model, candidates(5))
    solution = fit(model, candidates(5))
    expected, _ = nnls(gradients.T, -theta)
    np.testing.assert_allclose(solution.samples.multipliers.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("method", ["nnls", "gradient"])
def test_targets_of_a_loss_of_ones_own(method):
    """One logit for two classes, and several labels at once: 0 and 1 in float rows."""

    def binary(logits, labels):
        return nn.functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits), reduction="none"
        ).sum(dim=1)

    samples = candidates(8)
    generator = torch.Generator().manual_seed(3)
    for width in (1, 3):
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, width)).double()
        targets = torch.randint(2, (8, width), generator=generator).double()
        targets[0] = 0  # in no class: a row that does not sum to 1
        config = None if method == "nnls" else GradientConfig(steps=2000, distance="l2")
        found = fit_multipliers(
            model, samples.inputs, targets, method=method, loss_fn=binary, config=config
        )
        rows = []
        for x, y in zip(samples.inputs, targets, strict=True):
            loss = binary(model(x[None]), y[None]).sum()
            parts = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        _, norm = nnls(torch.stack(rows).numpy().T, -theta.numpy())
        expected = norm / float(theta.norm())
        assert found.residuals.stationarity == pytest.approx(
            expected, rel=1e-9 if method == "nnls" else 1e-3
        )
        if method == "nnls" and width == 1:
            assert found.certificate.per_sample["label"].tolist() == targets[:, 0].int().tolist()
    with pytest.raises(ValueError, match=r"pass a loss_fn for one that tells two classes apart"):
        fit_multipliers(nn.Sequential(nn.Flatten(), nn.Linear(32, 1)), samples.inputs, [0, 1] * 4)
