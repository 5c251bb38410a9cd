"""Intervals against the formulas, alone and together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dsvlib.analysis.statistics import difference

SAMPLES = np.random.default_rng(0).normal(size=(2, 6)) * [[1], [3]]


def test_paired_interval_is_the_formula() -> None:
    d = SAMPLES[0] - SAMPLES[1]
    half = stats.t.ppf(0.975, 5) * d.std(ddof=1) / np.sqrt(6)
    found = difference(*SAMPLES, paired=True)
    assert found[:3] == pytest.approx((d.mean(), d.mean() - half, d.mean() + half))
    # an interval just excludes zero at p = 0.05
    shifted = difference(SAMPLES[0] - found.low, SAMPLES[1], paired=True)
    assert shifted.p == pytest.approx(0.05)


def test_welch_interval_is_the_formula() -> None:
    a, b = SAMPLES[0], SAMPLES[1][:4]
    parts = a.var(ddof=1) / 6, b.var(ddof=1) / 4
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 5 + parts[1] ** 2 / 3)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    gain = a.mean() - b.mean()
    assert difference(a, b)[:3] == pytest.approx((gain, gain - half, gain + half))


def test_what_does_not_vary_cannot_be_tested() -> None:
    for first, second, paired in (([0.1] * 2, [0.1] * 2, False), ([3.0, 4.0], [1.0, 2.0], True)):
        gain, low, high, p = difference(first, second, paired=paired)
        assert gain == pytest.approx(np.mean(first) - np.mean(second))
        assert np.isnan([low, high, p]).all()
    assert np.isnan(difference([1.0, np.nan], [1.0, 2.0])).all()


def test_too_few_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two values each, got 1 and 2"):
        difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="pairs, got 3 and 2"):
        difference([1.0, 2.0, 3.0], [1.0, 2.0], paired=True)


def test_intervals_of_many_comparisons_hold_together() -> None:
    alone, third = (difference(*SAMPLES, paired=True, comparisons=k) for k in (1, 3))
    d = SAMPLES[0] - SAMPLES[1]
    half = stats.t.ppf(1 - 0.025 / 3, 5) * d.std(ddof=1) / np.sqrt(6)
    assert third.interval == pytest.approx((d.mean() - half, d.mean() + half))
    assert third.p == alone.p
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(400):  # of four true differences of zero, how often is one interval wrong?
        noise = rng.normal(size=(4, 8))
        found = [difference(row, np.zeros(8), paired=True, comparisons=4) for row in noise]
        missed += any(f.low > 0 or f.high < 0 for f in found)
    assert missed <= 32  # 5 % of 400 and three standard errors
