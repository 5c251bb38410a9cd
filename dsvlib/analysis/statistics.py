"""Is one mean above another? Student's intervals, p-values of many, and what they say of a claim.

Paired, with dⱼ = aⱼ − bⱼ over n seeds:      d̄ ± t_{0.975, n−1}·s_d/√n
Independent, variances unequal (Welch):      ā − b̄ ± t_{0.975, ν}·√(s_a²/n + s_b²/m)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


class Difference(NamedTuple):
    """A difference of means with its 95 % interval and the two-sided p-value of no difference."""

    gain: float
    low: float
    high: float
    p: float


def difference(first: ArrayLike, second: ArrayLike, *, paired: bool = False) -> Difference:
    """Compare the means of `first` [n] and `second` [m], seed by seed where `paired` (m = n).

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
    low, high = test.confidence_interval(0.95)
    return Difference(gain, float(low), float(high), float(test.pvalue))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values corrected for their number (Holm 1979), in the order given.

    NaN, where nothing could be tested, stays NaN and does not count. Raises ValueError for others
    outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or ((p < 0) | (p > 1)).any():
        raise ValueError(
            f"expected a list of p-values from 0 to 1, got {p.tolist()}; pass those of the tests"
        )
    order = p.argsort(kind="stable")[: np.isfinite(p).sum()]  # NaN is sorted last
    corrected = np.full_like(p, np.nan)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected


def verdict(necessary: Iterable[object], further: Iterable[object] = ()) -> str:
    """Return what findings say of a claim: the one rule of all notebooks.

    A finding is ``"better"`` or True where it was shown, ``"undecided"`` where an interval leaves
    it open, anything else where it does not hold. Without every one of the `necessary` findings a
    claim is ``"not reproduced"``, or ``"undecided"`` where none of them fails; with them it is
    ``"reproduced"`` if all the `further` ones were shown as well, else ``"partly"``.
    """
    needed = [str(finding) for finding in necessary]
    shown = ("better", "True")
    if not needed:
        raise ValueError(
            "necessary: expected at least one finding, got none; name what the claim cannot do "
            "without"
        )
    if all(finding in shown for finding in needed):
        more = all(str(finding) in shown for finding in further)
        return "reproduced" if more else "partly"
    open_ones = (*shown, "undecided")
    return "undecided" if all(f in open_ones for f in needed) else "not reproduced"
