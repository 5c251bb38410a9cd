"""Best of several candidates, by a score that needs no training data.

Two numbers per sample, both from the classifier under study alone:

    robustness_i = (1/V) Σ_v log p(y_i | A_v(x_i))              the label under V augmented views
    share_i      = −λ_i ⟨θ, ∇_θ L_i⟩ / (‖θ‖·‖Σ_j λ_j ∇_θ L_j‖)   its part of the stationarity cosine

A score by the classifier that the samples were optimised for can favour what fools it: check with a
judge whether the choice helps, and say "best of k".
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn

from dsvlib._validation import as_generator, check_count, check_number, check_same_length
from dsvlib.augmentation import AugmentationConfig, augment
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import SampleGradients
from dsvlib.support_set import SupportSet

# stronger than in synthesis, where the label holds under nearly every view
VIEWS = AugmentationConfig(translate=0.125, scale=0.2, rotate=10.0, noise=0.5)


def rank(
    model: nn.Module,
    samples: SupportSet,
    *,
    views: int = 32,
    augmentation: AugmentationConfig = VIEWS,
    share_weight: float = 0.0,
    generator: torch.Generator | None = None,
) -> pd.DataFrame:
    """Rank the samples of each class by what the classifier alone says about them.

    Within a class both numbers become places from 0 (worst) to 1 (best), and the score is
    (1 − w)·place(robustness) + w·place(share).

    Parameters
    ----------
    views
        V, augmented copies of each sample.
    augmentation
        A; set `fill` to the background's colour for images that have one.
    share_weight
        w in [0, 1].
    generator
        CPU generator for the views; default: a fresh one with seed 0.

    Returns a row per sample, in their order: label, robustness, share, score, rank (1 is the best
    of its class; ties go to the earlier sample). The model is left as it was.
    """
    check_count("views", views)
    check_number("share_weight", share_weight, at_least=0)
    if share_weight > 1:
        raise ValueError(f"share_weight: expected a part from 0 to 1, got {share_weight!r}")
    generator = as_generator(generator)
    found = SampleGradients(model, samples.inputs, samples.labels)
    multipliers = samples.multipliers.to(found.theta)
    robustness = torch.zeros(len(samples), dtype=torch.float64)
    with evaluation_mode(model), torch.no_grad():
        for _ in range(views):
            seen = augment(found.inputs, augmentation, generator=generator)
            robustness -= found.classifier.losses(seen, found.labels)[0].cpu().double() / views
        pull = found.weighted_sum(multipliers)
        share = -multipliers * found.directional(found.theta)
        size = float(found.theta.norm()) * float(pull.cpu().double().norm())
        share = share / size if size > 0 else torch.zeros_like(share)
    table = pd.DataFrame(
        {
            "label": samples.hard_labels.tolist(),
            "robustness": robustness.tolist(),
            "share": share.tolist(),
        }
    )
    groups = table.groupby("label")
    firm, own = (groups[name].transform(_places) for name in ("robustness", "share"))
    table["score"] = (1 - share_weight) * firm + share_weight * own
    order = table["score"].rank(method="first", ascending=False)
    table["rank"] = order.groupby(table["label"]).rank(method="first").astype(int)
    return table


def best(samples: SupportSet, ranking: pd.DataFrame, *, per_class: int = 1) -> SupportSet:
    """Return the `per_class` best samples of each class, in the order of classes, then ranks.

    Multipliers stay as they are: for a stationary set fit them anew with `fit_multipliers`.
    """
    check_count("per_class", per_class)
    check_same_length(samples=len(samples), ranking=len(ranking))
    kept = ranking.reset_index(drop=True)
    kept = kept[kept["rank"] <= per_class].sort_values(["label", "rank"])
    return samples[torch.as_tensor(kept.index.to_numpy().copy())]


def _places(values: pd.Series) -> pd.Series:
    """Return the place of each value from 0 (lowest) to 1 (highest); alone it has 1."""
    return (values.rank() - 1) / (len(values) - 1) if len(values) > 1 else values * 0.0 + 1.0
