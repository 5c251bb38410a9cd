"""Ranking: the formula against a plain loop, and that it finds what it should."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import build, candidates, delicate, sample_gradients
from torch.nn import functional as F

from companion.recipes import classifier
from dsvlib import AugmentationConfig, SupportSet, residuals
from dsvlib.ranking import VIEWS, best, rank
from dsvlib.synthesis import BLACK

ON_BLACK = dataclasses.replace(VIEWS, fill=BLACK)
PLAIN = AugmentationConfig()  # leaves every image as it is


def test_parts_are_what_the_formula_says():
    model, samples = build("conv"), candidates(6)
    table = rank(model, samples, views=2, augmentation=PLAIN)
    logits = model(samples.inputs)
    expected = -F.cross_entropy(logits, samples.labels, reduction="none")
    assert table["robustness"].tolist() == pytest.approx(expected.tolist())
    theta, gradients = sample_gradients(model, samples)
    weights = samples.multipliers.numpy()
    pull = weights @ gradients
    share = -weights * (gradients @ theta) / (pull @ pull * (theta @ theta)) ** 0.5
    assert table["share"].tolist() == pytest.approx(share.tolist())
    assert table["share"].sum() == pytest.approx(residuals(model, samples).cosine)


def test_ranks_are_within_the_class():
    model, samples = build("conv"), candidates(9)
    for weight, name in ((0.0, "robustness"), (1.0, "share")):
        table = rank(model, samples, augmentation=PLAIN, share_weight=weight)
        for _, part in table.groupby("label"):
            assert sorted(part["rank"]) == [1, 2, 3]
            assert part.sort_values("rank")[name].is_monotonic_decreasing
            assert sorted(part["score"]) == [0, 0.5, 1]
    half = rank(model, samples, augmentation=PLAIN, share_weight=0.5)
    ends = [rank(model, samples, augmentation=PLAIN, share_weight=w)["score"] for w in (0.0, 1.0)]
    assert half["score"].tolist() == pytest.approx(((ends[0] + ends[1]) / 2).tolist())


def test_best_keeps_the_first_of_each_class():
    model, samples = build("conv"), candidates(9)
    table = rank(model, samples)
    kept = best(samples, table, per_class=2)
    assert kept.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for i, label in enumerate((0, 1, 2)):
        first = table[(table["label"] == label) & (table["rank"] == 1)].index[0]
        assert torch.equal(kept.inputs[2 * i], samples.inputs[first])
    with pytest.raises(ValueError, match="samples 9, ranking 3"):
        best(samples, table[:3])


def test_one_seed_one_ranking_and_the_model_is_left_alone(untouched):
    model, samples = delicate(), candidates(6)
    with untouched(model):
        first = rank(model, samples, generator=torch.Generator().manual_seed(3))
    assert first.equals(rank(model, samples, generator=torch.Generator().manual_seed(3)))
    with pytest.raises(ValueError, match="share_weight"):
        rank(model, samples, share_weight=1.5)


def test_real_digits_come_before_the_same_under_noise(digits):
    """A case where the right order is known: each digit beside its own copy under heavy noise."""
    model, _ = classifier("digits-convnet", digits)
    clean, labels = digits.train.inputs[:100], digits.train.labels[:100]
    noisy = clean + 2.0 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    both = SupportSet(torch.cat([clean, noisy]), labels.repeat(2), torch.ones(200))
    score = rank(model, both, augmentation=ON_BLACK)["robustness"].to_numpy()
    assert (score[:100] > score[100:]).mean() > 0.65  # chance 0.5, three standard errors
    shuffled = dataclasses.replace(both, labels=both.labels.roll(1))
    assert rank(model, shuffled, augmentation=ON_BLACK)["robustness"].mean() < score.mean()
