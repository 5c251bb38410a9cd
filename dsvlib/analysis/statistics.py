"""Is one mean above another? Student's intervals, which hold together where there are many.

Paired, with dⱼ = aⱼ − bⱼ over n seeds:      d̄ ± t_{q, n−1}·s_d/√n
Independent, variances unequal (Welch):      ā − b̄ ± t_{q, ν}·√(s_a²/n + s_b²/m)

with q = 1 − 0.025/k for k comparisons that one claim rests on (Bonferroni).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Difference(NamedTuple):
    """A difference of means with its interval and the two-sided p-value of no difference."""

    gain: float
    low: float
    high: float
    p: float

    @property
    def interval(self) -> tuple[float, float]:
        """The two ends, (low, high)."""
        return self.low, self.high


def difference(
    first: ArrayLike, second: ArrayLike, *, paired: bool = False, comparisons: int = 1
) -> Difference:
    """Compare the means of `first` [n] and `second` [m], seed by seed where `paired` (m = n).

    With `comparisons`, the number of such intervals that a claim rests on, they all hold together
    with at least 95 %; p is that of this one alone.
    Where nothing varies, or a value is NaN, there is nothing to test with: interval and p are NaN.
    Raises ValueError for fewer than two values, or unequal lengths of pairs.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if min(len(a), len(b)) < 2 or (paired and len(a) != len(b)):
        raise ValueError(
            f"expected at least two values each{' and pairs' if paired else ''}, got {len(a)} and "
            f"{len(b)}; run more seeds"
        )
    gain = float(a.mean() - b.mean())
    spread = (a - b).std() if paired else max(a.std(), b.std())
    if not spread > 1e-12 * max(1.0, abs(gain)):
        return Difference(gain, np.nan, np.nan, np.nan)
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(1 - 0.05 / comparisons)
    return Difference(gain, float(low), float(high), float(test.pvalue))
