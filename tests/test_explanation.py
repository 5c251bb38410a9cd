"""Predictions as sums over support vectors: against SVMs, autograd and networks that are sums."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, SHAPE, build, candidates, sample_gradients
from sklearn.svm import SVC
from torch import Tensor, nn

from dsvlib import SupportSet, explain, fit_multipliers, suspicious

poor = pytest.mark.filterwarnings("ignore:explain. expected the support vectors")


def numbers(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def logit_gradients(model: nn.Module, inputs: Tensor, classes: Tensor) -> np.ndarray:
    """Return ∇_θ Φ_c(x), [m, P], one backward pass each."""
    asked = SupportSet(inputs, classes, torch.ones(len(inputs)).double())
    chosen = lambda logits, labels: logits[torch.arange(len(labels)), labels]  # noqa: E731
    return sample_gradients(model, asked, loss_fn=chosen)[1]


@poor
@pytest.mark.parametrize("kind", ["dense", "conv", "conv-group", "conv-batch"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_terms_are_products_of_two_gradients(kind, soft, untouched):
    model, support, inputs = build(kind), candidates(7, soft=soft), numbers(5, *SHAPE)
    with untouched(model):
        found = explain(model, inputs, support)
    with torch.no_grad():
        logits = model.eval()(inputs)
    classes = logits.argmax(dim=1)
    theta, rows = sample_gradients(model, support)
    asked = logit_gradients(model, inputs, classes)
    terms = -(asked @ rows.T) * support.multipliers.numpy()
    np.testing.assert_allclose(found.contributions.numpy(), terms, atol=1e-12)
    np.testing.assert_allclose(found.total.numpy(), terms.sum(axis=1))
    np.testing.assert_allclose(found.expected.numpy(), asked @ theta)
    torch.testing.assert_close(found.logits, logits.gather(1, classes[:, None])[:, 0])
    assert torch.equal(found.classes, classes)
    assert torch.equal(found.labels, support.hard_labels)
    torch.testing.assert_close(found.completeness, (found.total / found.expected - 1).abs())


class ReLUs(nn.Sequential):
    """Three layers without biases: homogeneous of degree 3 in θ.

    A sum of gradients has no mean over the classes, and in each unit as much of what comes in as of
    what goes out, ⟨∇L, w⟩; so has θ here, or it could not be such a sum.
    """

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(*sizes, bias=False) for sizes in ((32, 4), (4, 4), (4, CLASSES))]
        super().__init__(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.double()
        with torch.no_grad():
            layers[2].weight -= layers[2].weight.mean(dim=0)
            for before, after in 200 * list(itertools.pairwise(layers)):
                ratio = (after.weight.norm(dim=0) / before.weight.norm(dim=1)).sqrt()
                before.weight *= ratio[:, None]
                after.weight /= ratio


@pytest.fixture(scope="module")
def exact() -> tuple[nn.Module, SupportSet]:
    """A network that is a sum over its support vectors to rounding: samples to spare."""
    model, inputs = ReLUs(), numbers(900, *SHAPE, seed=1)
    labels = torch.randint(CLASSES, (900,), generator=torch.Generator().manual_seed(2))
    solution = fit_multipliers(model, inputs, labels)
    assert solution.residuals.stationarity < 1e-9
    return model, solution.samples


def test_network_without_biases_is_the_sum_over_its_support_vectors(exact):
    model, support = exact
    inputs = numbers(20, *SHAPE, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explain(model, inputs, support)
    assert float(found.completeness.max()) < 1e-5
    assert found.degree == pytest.approx(3)
    torch.testing.assert_close(found.total / 3, found.logits, rtol=1e-7, atol=1e-9)
    assert 0 < (found.contributions != 0).any(dim=0).sum() < len(support)  # as NNLS: few are active


def test_single_precision_is_complete_to_five_digits(exact):
    model, support = exact
    single = SupportSet(support.inputs.float(), support.labels, support.multipliers.float())
    try:
        found = explain(model.float(), numbers(20, *SHAPE, seed=5).float(), single)
    finally:
        model.double()
    assert float(found.completeness.median()) < 1e-5


def test_linear_svm_term_by_term():
    """The terms of scikit-learn's decision function: αᵢ yᵢ ⟨xᵢ, x⟩."""
    inputs, asked = numbers(60, 4), numbers(9, 4, seed=8)
    labels = (inputs[:, 0] + 0.3 * inputs[:, 1] > 0.1 * inputs[:, 2]).long()
    machine = SVC(kernel="linear", C=2.0, tol=1e-9).fit(inputs.numpy(), labels.numpy())
    model = nn.Linear(4, 1).double()
    model.weight.data = torch.tensor(machine.coef_)
    model.bias.data = torch.tensor(machine.intercept_)
    alphas = torch.zeros(60).double()
    alphas[machine.support_] = torch.tensor(np.abs(machine.dual_coef_[0]))

    def hinge(logits: Tensor, y: Tensor) -> Tensor:
        """Return −y f, the slope of the hinge at every support vector, kinks too."""
        return -(2 * y - 1).to(logits.dtype) * logits[:, 0]

    found = explain(
        model,
        asked,
        SupportSet(inputs, labels, alphas),
        params={"weight": model.weight},
        loss_fn=hinge,
    )
    terms = machine.dual_coef_ * (asked.numpy() @ machine.support_vectors_.T)
    np.testing.assert_allclose(found.contributions[:, machine.support_].numpy(), terms, atol=1e-9)
    decision = machine.decision_function(asked.numpy()) - machine.intercept_
    np.testing.assert_allclose(found.total.numpy(), decision, atol=1e-6)
    assert float(found.completeness.median()) < 1e-6


@poor
def test_last_layer_alone_gives_representer_points():
    model, support, inputs = build("dense"), candidates(6), numbers(4, *SHAPE)
    found = explain(model, inputs, support, classes=1, params={"3.weight": model[3].weight})
    with torch.no_grad():
        features, others = model[:3](support.inputs), model[:3](inputs)
        slope = model(support.inputs).softmax(dim=1)[:, 1] - (support.labels == 1).double()
    torch.testing.assert_close(
        found.contributions, -support.multipliers * slope * (others @ features.T)
    )
    assert found.classes.tolist() == [1, 1, 1, 1]


@poor
@pytest.mark.parametrize("options", [{"batch_size": 3}, {"memory": 1e-9}, {"memory": 2e-6}])
def test_streaming_changes_nothing(options):
    model, support, inputs = build("conv"), candidates(8), numbers(7, *SHAPE)
    whole, parts = explain(model, inputs, support), explain(model, inputs, support, **options)
    torch.testing.assert_close(parts.contributions, whole.contributions)
    torch.testing.assert_close(parts.expected, whole.expected)


@poor
def test_samples_without_a_multiplier_have_no_part():
    model, support, inputs = build("conv"), candidates(8), numbers(3, *SHAPE)
    weights = support.multipliers.clone()
    weights[[1, 4]] = 0
    some = replace(support, multipliers=weights)
    found = explain(model, inputs, some)
    kept = explain(model, inputs, some[weights > 0])
    assert not found.contributions[:, [1, 4]].any()
    torch.testing.assert_close(found.contributions[:, weights > 0], kept.contributions)


@poor
def test_top_lists_the_largest_terms():
    model, support, inputs = build("conv"), candidates(8), numbers(3, *SHAPE)
    found = explain(model, inputs, support, classes=[0, 2, 1])
    table = found.top(3)
    assert list(table) == [
        "prediction",
        "class",
        "rank",
        "support",
        "label",
        "contribution",
        "share",
    ]
    assert table["prediction"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert table["class"].tolist() == [0, 0, 0, 2, 2, 2, 1, 1, 1]
    assert table["rank"].tolist() == [1, 2, 3] * 3
    for row, own in table.groupby("prediction"):
        terms = found.contributions[row].numpy()
        assert own["contribution"].tolist() == sorted(terms, reverse=True)[:3]
        assert (terms[own["support"]] == own["contribution"]).all()
        assert own["label"].tolist() == support.labels[own["support"].tolist()].tolist()
        np.testing.assert_allclose(own["share"], own["contribution"] / terms[terms > 0].sum())
    assert len(found.top(100)) == 3 * 8


def refused() -> list[tuple[dict[str, Any], str]]:
    support = candidates(4)
    return [
        ({"inputs": numbers(3, 2, 5, 5)}, r"inputs: expected samples of shape \[2, 4, 4\]"),
        ({"classes": 3}, "classes: expected numbers from 0 to 2"),
        ({"classes": [0, 1]}, "inputs 3, classes 2"),
        ({"classes": [0, -1, 1]}, "classes: expected numbers from 0 to 2"),
        ({"support": replace(support, multipliers=torch.zeros(4).double())}, "λ > 0, got none"),
        (
            {"support": replace(support, labels=torch.tensor([0, 1, 2, 3]))},
            "labels: expected class",
        ),
        ({"params": {"nobody": numbers(2)}}, "names of the model's parameters, got 'nobody'"),
        ({"memory": 0}, "memory: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
    ]


@pytest.mark.parametrize(("changes", "message"), refused(), ids=lambda value: str(value)[:20])
def test_what_does_not_fit_is_refused_in_a_sentence(changes, message, untouched):
    model = build("conv")
    given = {"inputs": numbers(3, *SHAPE), "support": candidates(4)} | changes
    with untouched(model), pytest.raises(ValueError, match=message):
        explain(model, **given)


def test_support_that_says_little_is_warned_of_with_the_number():
    model = build("conv")
    with pytest.warns(UserWarning, match=r"off by \d+% \(median\).*fit λ"):
        found = explain(model, numbers(3, *SHAPE), candidates(4))
    assert float(found.completeness.median()) > 0.1


@pytest.mark.parametrize("batch_size", [3, 64])
def test_suspicion_is_the_share_of_the_own_term(batch_size, untouched):
    model, support = build("conv"), candidates(8)
    weights = support.multipliers.clone()
    weights[5] = 0
    support = replace(support, multipliers=weights)
    with untouched(model):
        table = suspicious(model, support, batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = explain(model, support.inputs, support, classes=support.labels)
    assert list(table) == ["index", "label", "score"]
    assert table["score"].is_monotonic_decreasing
    assert sorted(table["index"]) == list(range(8))
    assert table["label"].tolist() == support.labels[table["index"].tolist()].tolist()
    terms = found.contributions
    expected = terms.diagonal() / terms.abs().sum(dim=1)
    np.testing.assert_allclose(table.set_index("index")["score"].sort_index(), expected)
    assert table.set_index("index")["score"][5] == 0
