"""What the logits Φ(x; θ) of a batch say: the loss L, the predicted class, entropy and margin.

Shapes: logits [n, K]; labels int64 [n] or float [n, K] (soft); every function returns [n].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsvlib._validation import (
    ONE_SCORE,
    as_labels,
    check_label_range,
    check_number,
    check_same_length,
)

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    """L of each sample, [n]: the cross-entropy of logits / T, T being the temperature.

    T = 1 is the papers' loss. At a higher one (Hinton, Vinyals and Dean 2015) a sample that is
    classified with confidence keeps a gradient, and so its part in Σ λᵢ ∇_θ Lᵢ. Labels are class
    numbers or rows over K.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each sample, [n]."""
        if labels.is_floating_point():
            labels = labels.to(logits.dtype)
        if self.temperature != 1:
            logits = logits / self.temperature
        return F.cross_entropy(logits, labels, reduction="none")


cross_entropy = CrossEntropy()


def predict(logits: Tensor) -> Tensor:
    """Return the predicted class of each sample, [n]; one logit means a binary score f(x)."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).long()
    return logits.argmax(dim=1)


def is_feasible(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which samples are classified as labelled (soft: as their largest entry), [n].

    Where a row of labels does not sum to 1 it says of every logit whether it is positive.
    """
    if not labels.is_floating_point():
        return predict(logits) == labels
    several = (labels.sum(dim=1) - 1).abs() > 1e-3
    if logits.shape[1] == 1:  # one score, not one class
        several = torch.ones_like(several)
    signs = ((logits > 0) == (labels > 0.5)).all(dim=1)
    return torch.where(several, signs, predict(logits) == labels.argmax(dim=1))


def check_logits(logits: Tensor) -> None:
    """Raise ValueError unless `logits` is [n, K] with K ≥ 2, TypeError where it holds no floats."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(
            f"logits: expected a float tensor [n, K], got {kind}; pass the classifier's output"
        )
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits: expected shape [n, K] with K ≥ 2, got {list(logits.shape)}; "
            f"pass the classifier's output for a batch"
        )


def check_scores(logits: Tensor) -> None:
    """Raise ValueError for what cross-entropy is 0 of, and warn where it takes softmax twice."""
    if logits.shape[1] == 1:
        raise ValueError(
            "loss_fn: expected two logits or more for cross-entropy, got one, of which it is "
            f"always 0; {ONE_SCORE}"
        )
    sums = logits.sum(dim=1)
    if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        warnings.warn(
            "model: expected logits, got probabilities (rows ≥ 0 that sum to 1), of which "
            "cross-entropy takes the softmax again; leave out the network's last softmax",
            stacklevel=2,
        )


def entropy(logits: Tensor) -> Tensor:
    """Return −Σ_c p_c log p_c of the softmax probabilities, in nats, [n]; from 0 to log K."""
    check_logits(logits)
    log_probabilities = F.log_softmax(logits, dim=1)
    # p·log p → 0 as p → 0: masked where exp underflowed, since 0·(−∞) would be a NaN
    product = log_probabilities.exp() * log_probabilities.clamp(min=-1e4)
    return 0.0 - product.sum(dim=1)  # not −0 where one class is certain


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return Φ_y(x) − max_{c≠y} Φ_c(x), [n]; negative where the sample is misclassified.

    Soft labels count as their most probable class.
    """
    check_logits(logits)
    labels = as_labels(labels)
    check_same_length(logits=len(logits), labels=len(labels))
    check_label_range(labels, logits.shape[1])
    target = labels.argmax(dim=1) if labels.is_floating_point() else labels
    chosen = logits.gather(1, target[:, None])
    others = logits.scatter(1, target[:, None], -torch.inf)
    return chosen[:, 0] - others.amax(dim=1)
