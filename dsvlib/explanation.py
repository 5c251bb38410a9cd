"""A prediction as a sum over support vectors: what an SVM's decision function is for a network.

With θ = −Σᵢ λᵢ ∇_θ Lᵢ, the logit of class c of a network that is homogeneous of degree d in θ is

    Φ_c(x) = (1/d) ⟨∇_θ Φ_c(x), θ⟩ = (1/d) Σᵢ cᵢ(x),    cᵢ(x) = −λᵢ ⟨∇_θ Φ_c(x), ∇_θ Lᵢ⟩

a kernel expansion over the support vectors with the network's own tangent kernel. It is ours, not
the papers'. Relatives: representer points (Yeh et al. 2018) have the last layer only, path kernels
(Domingos 2020) the whole training path; that homogeneous networks end as such sums is of Lyu and Li
(2020). For a linear SVM cᵢ is αᵢ yᵢ ⟨xᵢ, x⟩, the terms of its decision function.

How much of ⟨∇_θ Φ_c, θ⟩ the sum leaves out says how far from stationary the network is on these
samples; biases and norms keep ⟨∇_θ Φ_c, θ⟩ from being d times the logit.

Shapes: x [m, C, H, W], n support vectors, contributions [m, n].
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from dsvlib._progress import progress_bar
from dsvlib._validation import as_labels, check_count, check_inputs, check_number, check_same_length
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import SampleGradients
from dsvlib.logits import LossFn
from dsvlib.support_set import SupportSet

POOR = 0.1  # median completeness from which a warning is given


@dataclass(frozen=True, eq=False)
class Explanation:
    """Predictions as sums over support vectors; tensors lie on the CPU, in float64.

    contributions
        cᵢ(x) = −λᵢ ⟨∇_θ Φ_c(x), ∇_θ Lᵢ⟩, [m, n]; positive ones speak for class c.
    total
        Σᵢ cᵢ(x), [m].
    expected
        ⟨∇_θ Φ_c(x), θ⟩, [m]: what `total` is where θ = −Σ λᵢ ∇_θ Lᵢ.
    logits
        Φ_c(x), [m].
    completeness
        |total − expected| / |expected|, [m]: 0 where the sum says all.
    degree
        d, the slope of `expected` in `logits`: the number of layers of a ReLU network without bias.
    classes, labels
        c, int64 [m]; those of the support vectors, int64 [n].
    """

    contributions: Tensor
    total: Tensor
    expected: Tensor
    logits: Tensor
    completeness: Tensor
    degree: float
    classes: Tensor
    labels: Tensor

    def top(self, k: int = 5) -> pd.DataFrame:
        """Return the k largest contributions to each prediction, a row each, largest first.

        Columns: prediction (row of the inputs), class, rank (from 1), support (index of the support
        vector), label (the support vector's), contribution, share (of all positive contributions).
        """
        check_count("k", k)
        k = min(k, self.contributions.shape[1])
        values, index = self.contributions.topk(k, dim=1)
        mass = self.contributions.clamp(min=0).sum(dim=1, keepdim=True)
        count = len(self.classes)
        columns = {
            "prediction": torch.arange(count).repeat_interleave(k),
            "class": self.classes.repeat_interleave(k),
            "rank": torch.arange(1, k + 1).repeat(count),
            "support": index,
            "label": self.labels[index],
            "contribution": values,
            "share": (values / mass).nan_to_num(),
        }
        return pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()})


def explain(
    model: nn.Module,
    inputs: Tensor,
    support: SupportSet,
    *,
    classes: Tensor | Sequence[int] | int | None = None,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    batch_size: int = 64,
    memory: float = 1.0,
) -> Explanation:
    """Return the predictions at `inputs` as sums over `support`.

    Parameters
    ----------
    model
        The classifier that λ was fitted to; read in evaluation mode and left as it was.
    inputs
        What is predicted, [m, C, H, W].
    support
        Samples with λ ≥ 0, as `fit_multipliers` or `synthesize` return them; only those with λ > 0
        are differentiated.
    classes
        The class whose logit is explained, one for all or one for each input; default: the
        predicted one. A network with one logit has class 0 only.
    params
        The parameters that the sums run over, those that λ was fitted for; default: all that
        require grad. Of the last layer alone the terms are those of representer points.
    loss_fn
        L, ``loss_fn(logits, labels) -> [n]``, as λ was fitted for; default: cross-entropy.
    batch_size
        Samples whose gradients are taken at a time.
    memory
        Gigabytes for the gradients of the predictions; of support vectors one batch is held.

    Raises ValueError for inputs or support of another shape than the model reads, labels or classes
    out of range, and support without λ > 0. Warns where the median of `completeness` is above 0.1.
    """
    check_number("memory", memory, above=0)
    check_count("batch_size", batch_size)
    active = _active(support)
    kept = support[active.to(support.inputs.device)]
    samples = SampleGradients(
        model, kept.inputs, kept.labels, params=params, loss_fn=loss_fn, batch_size=batch_size
    )
    theta, weights = samples.theta, support.multipliers.detach()[active]
    if check_inputs(inputs).shape[1:] != support.inputs.shape[1:]:
        raise ValueError(
            f"inputs: expected samples of shape {list(support.inputs.shape[1:])} as the support "
            f"vectors, got {list(inputs.shape[1:])}; take both from one data set"
        )
    with evaluation_mode(model):
        samples.logits()  # labels and losses are checked here
        chosen, logits = _classes(samples, inputs, classes)
        asked = SampleGradients(
            model, inputs, chosen, params=params, loss_fn=_logit, batch_size=batch_size
        )
        held = max(1, int(1e9 * memory / (len(theta) * theta.element_size())))
        found = torch.zeros(len(asked), len(support), dtype=torch.float64)
        expected = torch.zeros(len(asked), dtype=torch.float64)
        for start in range(0, len(asked), held):
            rows = slice(start, min(start + held, len(asked)))
            panel = asked.fill(theta.new_empty(rows.stop - start, len(theta)), start)
            expected[rows] = (panel @ theta).cpu().double()
            for first in progress_bar(range(0, len(samples), batch_size), "explanation"):
                columns = active[first : first + batch_size]
                strip = samples.fill(theta.new_empty(len(columns), len(theta)), first)
                found[rows, columns] = (panel @ strip.T).cpu().double()
    found[:, active] *= -weights.cpu().double()
    total = found.sum(dim=1)
    missing = torch.where(total == expected, 0.0, (total - expected).abs() / expected.abs())
    if not float(missing.median()) <= POOR:
        warnings.warn(
            f"explain: expected the support vectors to say all of ⟨∇Φ, θ⟩, got a sum that is off "
            f"by {float(missing.median()):.0%} (median): θ is not −Σ λᵢ∇Lᵢ on them; fit λ to this "
            f"model with fit_multipliers, on more samples or of a network nearer to stationary",
            stacklevel=2,
        )
    return Explanation(
        contributions=found,
        total=total,
        expected=expected,
        logits=logits,
        completeness=missing,
        degree=float((expected @ logits) / (logits @ logits)),
        classes=chosen,
        labels=support.hard_labels.cpu(),
    )


def suspicious(
    model: nn.Module,
    support: SupportSet,
    *,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    batch_size: int = 64,
    memory: float = 1.0,
) -> pd.DataFrame:
    """Return the samples by how much they hold only themselves, the likeliest label errors first.

    The score of sample i is cᵢ(xᵢ) / Σⱼ |cⱼ(xᵢ)| for its own label: the share of its own term in
    the logit of its class. A sample that others of its class speak for needs little of its own;
    one whose label they contradict stands by itself. Columns: index, label, score; 0 where λ = 0.

    Parameters as in `explain`. Raises ValueError as it does.
    """
    active = _active(support)
    kept = support[active.to(support.inputs.device)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out of the sum is no part of a share
        found = explain(
            model,
            kept.inputs,
            kept,
            classes=kept.hard_labels,
            params=params,
            loss_fn=loss_fn,
            batch_size=batch_size,
            memory=memory,
        )
    terms, score = found.contributions, torch.zeros(len(support), dtype=torch.float64)
    score[active] = (terms.diagonal() / terms.abs().sum(dim=1)).nan_to_num()
    table = pd.DataFrame(
        {"index": range(len(support)), "label": support.hard_labels.cpu(), "score": score}
    )
    return table.sort_values("score", ascending=False, kind="stable")


def _active(support: SupportSet) -> Tensor:
    """Return where λ > 0, on the CPU; raise ValueError where that is nowhere."""
    active = (support.multipliers.detach().cpu() > 0).nonzero()[:, 0]
    if not len(active):
        raise ValueError(
            "support: expected samples with λ > 0, got none; fit λ with fit_multipliers first"
        )
    return active


def _classes(
    samples: SampleGradients, inputs: Tensor, classes: Tensor | Sequence[int] | int | None
) -> tuple[Tensor, Tensor]:
    """Return the class to explain of each input, int64 [m], and its logit [m], on the CPU."""
    batches = inputs.detach().to(samples.theta).split(samples.batch_size)
    with torch.no_grad():
        logits = torch.cat([samples.classifier.logits(batch) for batch in batches]).cpu().double()
    if classes is None:
        chosen = logits.argmax(dim=1)
    elif isinstance(classes, int):
        chosen = torch.full((len(logits),), classes)
    else:
        chosen = as_labels(classes).cpu()
        check_same_length(inputs=len(logits), classes=len(chosen))
    if (
        chosen.is_floating_point()
        or not 0 <= int(chosen.min()) <= int(chosen.max()) < logits.shape[1]
    ):
        raise ValueError(
            f"classes: expected numbers from 0 to {logits.shape[1] - 1}, one for each input, got "
            f"{classes!r}; leave them out for the predicted ones"
        )
    return chosen, _logit(logits, chosen)


def _logit(logits: Tensor, classes: Tensor) -> Tensor:
    """Return Φ_c(x) of each sample, [n]: in the place of a loss, its gradient is ∇_θ Φ_c."""
    return logits.gather(1, classes[:, None])[:, 0]
