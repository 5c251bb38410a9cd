"""What samples and their multipliers say about a classifier: entropy, margin, λ and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from dsvlib._validation import (
    as_labels,
    check_count,
    check_label_range,
    check_number,
    check_same_length,
)
from dsvlib.classifiers.training import logits_of
from dsvlib.data.datasets import AnySplit, as_split
from dsvlib.logits import check_logits
from dsvlib.support_set import SupportSet


@dataclass(frozen=True)
class Correlation:
    """Pearson's ρ with its interval, of `n` points or of `n` rows of points (classifiers)."""

    value: float
    low: float
    high: float
    n: int


def pearson(
    x: Sequence[float] | np.ndarray | pd.Series | Tensor,
    y: Sequence[float] | np.ndarray | pd.Series | Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Return Pearson's ρ of x and y with an interval.

    Parameters
    ----------
    x, y
        [n]: one ρ, its interval a percentile bootstrap over the points; or [m, n]: the mean over
        rows of each row's ρ, its interval Student's t over the m of them (m classifiers with n
        classes each: classes of one classifier are not independent draws). A bootstrap over so few
        rows would be too narrow.
    confidence
        Of the interval, between 0 and 1.
    resamples, seed
        Of the bootstrap.

    Raises ValueError for shapes that differ, fewer than 3 points, fewer than 2 rows, numbers that
    are not finite, or a constant x or y, of which ρ is undefined.
    """
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if a.shape != b.shape or a.ndim not in (1, 2) or a.shape[-1] < 3 or len(a) < 2:
        raise ValueError(
            f"pearson: expected x and y of one shape, [n] or [m, n] with n ≥ 3 and m ≥ 2, got "
            f"{list(a.shape)} and {list(b.shape)}; pair the points and add more"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("pearson: expected finite numbers, got NaN or infinity; drop those points")
    if _is_constant(a).any() or _is_constant(b).any():
        raise ValueError(
            "pearson: expected x and y that vary, got a constant one; its ρ is undefined"
        )
    check_number("confidence", confidence, above=0)
    check_count("resamples", resamples)
    if confidence >= 1:
        raise ValueError(f"confidence: expected a number below 1, got {confidence}; 0.95 is usual")
    each = _correlation(a, b, -1)
    if a.ndim == 2:
        low, high = stats.t.interval(confidence, len(a) - 1, each.mean(), stats.sem(each))
    else:
        low, high = stats.bootstrap(
            (a, b),
            _correlation,
            paired=True,
            n_resamples=resamples,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Correlation(float(each.mean()), float(low), float(high), len(a))


def _is_constant(values: np.ndarray) -> np.ndarray:
    return np.ptp(values, axis=-1) <= 1e-12 * np.abs(values).max(axis=-1)


def _correlation(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """Return ρ along `axis`; 0 for a resample that drew one point n times."""
    x, y = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
    scale = np.sqrt((x**2).sum(axis=axis) * (y**2).sum(axis=axis))
    product = (x * y).sum(axis=axis)
    return np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)


def lambda_accuracy(samples: SupportSet, model: nn.Module, test: AnySplit) -> pd.DataFrame:
    """Return the sum of λ and the test accuracy of each class, and their correlation (DSV Fig. 2b).

    Columns: class (number), multiplier_sum (Σ of λᵢ, soft labels share theirs out), accuracy
    (fraction of the class's test samples that are classified right), deviation (accuracy minus its
    mean over the classes), and name where `samples.classes` is known. ``.attrs["pearson"]`` is ρ of
    multiplier_sum and accuracy; NaN where one of them is the same for all classes, since ρ is then
    undefined (equal λ on a balanced set, as a control, is such a case).

    Raises ValueError for labels outside the model's classes, or a class without test samples.
    """
    test = as_split(test)
    logits = logits_of(model, test.inputs).cpu()
    check_logits(logits)
    classes = logits.shape[1]
    check_label_range(as_labels(samples.labels), classes)
    labels = as_labels(test.labels).cpu()
    check_same_length(inputs=len(logits), labels=len(labels))
    check_label_range(labels, classes)
    target = labels.argmax(dim=1) if labels.is_floating_point() else labels
    counts = torch.bincount(target, minlength=classes)
    if bool((counts == 0).any()):
        raise ValueError(
            f"test: expected samples of all {classes} classes, got none of class "
            f"{int(counts.argmin())}; its accuracy is undefined, test on a complete split"
        )
    hits = torch.bincount(target[logits.argmax(dim=1) == target], minlength=classes)
    weights = samples.labels.detach().cpu().double()
    if weights.ndim == 1:
        weights = F.one_hot(samples.labels.cpu(), classes).double()
    sums = (samples.multipliers.detach().cpu().double() @ weights).numpy()
    accuracy = (hits.double() / counts).numpy()
    table = pd.DataFrame(
        {
            "class": range(classes),
            "multiplier_sum": sums,
            "accuracy": accuracy,
            "deviation": accuracy - accuracy.mean(),
        }
    )
    if len(samples.classes) == classes:
        table["name"] = samples.classes
    undefined = bool(_is_constant(sums) or _is_constant(accuracy))
    rho = float("nan") if undefined else float(_correlation(sums, accuracy, -1))
    table.attrs["pearson"] = rho
    return table
