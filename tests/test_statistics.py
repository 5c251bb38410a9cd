"""Intervals against the formulas, p-values of many against Holm's definition."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dsvlib.analysis.statistics import difference, holm, verdict

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


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert len(holm([])) == 0
    assert holm([0.04, np.nan, 0.01]) == pytest.approx([0.04, np.nan, 0.02], nan_ok=True)


@pytest.mark.parametrize("wrong", [[2, -1], [0.5, 1.1], [-0.01], [[0.1]], [np.inf]])
def test_holm_refuses_what_is_no_p_value(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="expected a list of p-values from 0 to 1, got"):
        holm(wrong)


@pytest.mark.parametrize(
    ("necessary", "further", "word"),
    [
        (["better", True], [], "reproduced"),
        ([True], ["better", True], "reproduced"),
        ([True], [False], "partly"),
        (["better"], ["undecided"], "partly"),
        (["worse"], [True, True], "not reproduced"),
        ([True, False], [True], "not reproduced"),
        (["better", "undecided"], [True], "undecided"),
        (["undecided", "worse"], [], "not reproduced"),
        ([np.bool_(True)], pd.Series(["better"]), "reproduced"),
    ],
)
def test_a_claim_stands_and_falls_with_its_necessary_part(necessary, further, word) -> None:
    assert verdict(necessary, further) == word


def test_a_claim_without_a_necessary_part_is_refused() -> None:
    with pytest.raises(ValueError, match="necessary: expected at least one finding"):
        verdict([], [True])
