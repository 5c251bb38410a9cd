"""Analysis against SciPy, hand-made cases and the paper's own points."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import CLASSES, build, candidates
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from dsvlib import Split, SupportSet, entropy, lambda_accuracy, margin
from dsvlib.analysis.lambda_accuracy import _correlation, pearson
from dsvlib.classifiers.training import logits_of

# Fig. 2b of the paper: test accuracy in percent and the sum of λ of each CIFAR-10 class
PAPER = {
    "airplane": (83.72, 2.61),
    "automobile": (93.74, 9.342),
    "bird": (80.10, 7.745),
    "cat": (72.96, 0.3212),
    "deer": (82.93, 4.761),
    "dog": (79.53, 5.255),
    "frog": (88.70, 6.807),
    "horse": (91.23, 7.568),
    "ship": (91.72, 7.037),
    "truck": (89.42, 7.99),
}


# --- entropy and margin --------------------------------------------------------------------------


def test_entropy_equals_scipy():
    logits = candidates(6).inputs.flatten(1)
    expected = stats.entropy(logits.softmax(dim=1).numpy(), axis=1)
    np.testing.assert_allclose(entropy(logits).numpy(), expected)


def test_entropy_at_both_ends():
    assert entropy(torch.zeros(1, 4)).item() == pytest.approx(math.log(4))
    certain = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    value = entropy(certain)
    value.sum().backward()
    assert value.item() == 0
    assert math.copysign(1, value.item()) == 1, "no −0 in a table"
    assert torch.isfinite(certain.grad).all()


def test_margin_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [2, -3]
    assert margin(logits, torch.eye(3)[[0, 2]]).tolist() == [2, -3]


def test_logits_are_floats():
    for read in (entropy, lambda logits: margin(logits, torch.tensor([0, 1]))):
        for logits, kind in (
            (torch.ones(2, 3).long(), "torch.int64"),
            (np.ones((2, 3)), "ndarray"),
        ):
            with pytest.raises(TypeError, match=f"expected a float tensor .*, got {kind}"):
                read(logits)


def test_logits_that_do_not_fit():
    with pytest.raises(ValueError, match="K ≥ 2"):
        entropy(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="K ≥ 2"):
        entropy(torch.zeros(3))
    with pytest.raises(ValueError, match="from 0 to 2, got 3"):
        margin(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match="logits 2, labels 1"):
        margin(torch.zeros(2, 3), torch.tensor([0]))


# --- λ and accuracy ------------------------------------------------------------------------------


def perfect_or_not(accuracies, count=1000):
    """Return a classifier that reads its answer off the input, and a test set for `accuracies`."""
    classes = len(accuracies)
    labels = torch.arange(classes).repeat_interleave(count)
    answers = labels.clone()
    for label, accuracy in enumerate(accuracies):
        wrong = count - round(count * accuracy)
        answers[label * count : label * count + wrong] = (label + 1) % classes
    model = torch.nn.Linear(classes, classes, bias=False)
    torch.nn.init.eye_(model.weight)
    return model, Split(torch.eye(classes)[answers], labels)


def test_the_papers_ten_points():
    accuracies, sums = np.array(list(PAPER.values())).T
    assert pearson(sums, accuracies).value == pytest.approx(0.783, abs=5e-4)
    # and through the whole table: two samples share each class's λ
    model, test = perfect_or_not(accuracies / 100, count=10_000)
    samples = SupportSet(
        torch.zeros(20, 10),
        torch.arange(10).repeat(2),
        torch.as_tensor(np.concatenate([0.25 * sums, 0.75 * sums]), dtype=torch.float32),
        classes=tuple(PAPER),
    )
    table = lambda_accuracy(samples, model, test)
    assert table.attrs["pearson"] == pytest.approx(0.783, abs=5e-4)
    assert table.columns.tolist() == ["class", "multiplier_sum", "accuracy", "deviation", "name"]
    assert table["name"].tolist() == list(PAPER)
    np.testing.assert_allclose(table["accuracy"], accuracies / 100)
    np.testing.assert_allclose(table["multiplier_sum"], sums, rtol=1e-6)
    np.testing.assert_allclose(table["deviation"], (accuracies - accuracies.mean()) / 100)


def test_lambda_accuracy_of_a_network(untouched):
    model, samples, test = build("conv-batch"), candidates(9), candidates(30, seed=4)
    with untouched(model):
        table = lambda_accuracy(samples, model, test)
    right = logits_of(model, test.inputs).argmax(dim=1) == test.labels
    for label in range(CLASSES):
        row = table.iloc[label]
        assert row["accuracy"] == pytest.approx(float(right[test.labels == label].double().mean()))
        own = samples.multipliers[samples.labels == label]
        assert row["multiplier_sum"] == pytest.approx(float(own.sum()))
    assert table["deviation"].sum() == pytest.approx(0)
    assert "name" not in table


def test_lambda_accuracy_of_any_torch_data_set():
    model, samples, test = build("conv"), candidates(9), candidates(30, seed=4)
    pairs = TensorDataset(test.inputs, test.labels)
    expected = lambda_accuracy(samples, model, test)
    assert lambda_accuracy(samples, model, pairs).equals(expected)
    assert lambda_accuracy(samples, model, DataLoader(pairs, batch_size=7)).equals(expected)


def test_soft_labels_share_their_multiplier_out():
    model, test = perfect_or_not([0.9, 0.5, 0.7])
    samples = SupportSet(
        torch.zeros(2, 3), torch.tensor([[0.5, 0.5, 0], [0, 0.2, 0.8]]), torch.tensor([2.0, 10.0])
    )
    table = lambda_accuracy(samples, model, test)
    np.testing.assert_allclose(table["multiplier_sum"], [1, 3, 8], rtol=1e-6)


def test_equal_sums_have_no_correlation():
    model, test = perfect_or_not([0.9, 0.5, 0.7])
    samples = SupportSet(torch.zeros(3, 3), torch.arange(3), torch.ones(3))
    assert math.isnan(lambda_accuracy(samples, model, test).attrs["pearson"])


def test_lambda_accuracy_errors():
    model, test = perfect_or_not([0.9, 0.5, 0.7])
    samples = SupportSet(torch.zeros(3, 3), torch.arange(3), torch.ones(3))
    with pytest.raises(ValueError, match="all 3 classes, got none of class 2"):
        lambda_accuracy(samples, model, test[:2000])
    with pytest.raises(ValueError, match="from 0 to 2, got 3"):
        lambda_accuracy(dataclasses.replace(samples, labels=torch.arange(3) + 1), model, test)
    with pytest.raises(ValueError, match="from 0 to 2, got 4"):
        lambda_accuracy(samples, model, Split(test.inputs, test.labels + 2))


# --- correlation ---------------------------------------------------------------------------------


def test_pearson_equals_scipy_with_an_interval_around_it():
    accuracies, sums = np.array(list(PAPER.values())).T
    found = pearson(sums, accuracies)
    assert found.value == pytest.approx(stats.pearsonr(sums, accuracies).statistic)
    assert found.n == 10
    assert -1 <= found.low < found.value < found.high <= 1
    assert found == pearson(torch.as_tensor(sums), list(accuracies))  # one seed, one interval
    narrow = pearson(sums, accuracies, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high
    assert pearson(sums, accuracies, seed=1).low != found.low


def test_pearson_over_classifiers_is_students_interval():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 10))
    y = x + 0.5 * rng.standard_normal((6, 10))
    found = pearson(x, y)
    each = np.array([stats.pearsonr(a, b).statistic for a, b in zip(x, y, strict=True)])
    half = stats.t.ppf(0.975, 5) * each.std(ddof=1) / np.sqrt(6)
    assert found.n == 6
    assert found.value == pytest.approx(each.mean())
    assert (found.low, found.high) == pytest.approx((each.mean() - half, each.mean() + half))


def test_interval_over_eight_classifiers_covers_what_it_says():
    rng, true, hits = np.random.default_rng(0), 0.5, []
    draws = rng.standard_normal((2, 20_000, 10))
    each = _correlation(draws[0], true * draws[0] + np.sqrt(1 - true**2) * draws[1], -1)
    for row in range(2000):  # the mean of ρ over classifiers, from eight of them
        x = draws[0, 8 * row : 8 * row + 8]
        y = true * x + np.sqrt(1 - true**2) * draws[1, 8 * row : 8 * row + 8]
        found = pearson(x, y)
        hits.append(found.low <= each.mean() <= found.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)  # the percentile bootstrap: 0.88


def test_bootstrap_survives_resamples_of_one_point():
    found = pearson([0, 1, 2], [0, 2, 1], resamples=500)  # one in nine draws a point three times
    assert np.isfinite([found.low, found.high]).all()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "n ≥ 3"),
        ([1, 2, 3], [1, 2], "one shape"),
        ([[1, 2, 3]], [[1, 2, 4]], "m ≥ 2"),
        ([1, 2, np.nan], [1, 2, 3], "finite"),
        ([1, 1, 1], [1, 2, 3], "undefined"),
        ([[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [5, 5, 5]], "undefined"),
    ],
)
def test_pearson_errors(x, y, message):
    with pytest.raises(ValueError, match=message):
        pearson(x, y)


def test_pearson_knob_errors():
    for options in ({"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pearson([1, 2, 3], [1, 3, 2], **options)
