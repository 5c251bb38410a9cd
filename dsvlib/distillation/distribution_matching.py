"""Distillation by distribution matching: DM and, with a trained classifier's DeepKKT loss, PDD.

    DM    Σ_c ‖mean ψ_θ(A_c(T_c)) − mean ψ_θ(A_c(S_c))‖²    arXiv 2110.04181
    PDD   DM + w·L_kkt(S, Λ)                                 arXiv 2405.00348

with the features ψ of a fresh random network at every step. Shapes: K classes, m synthetic and b
real images each, [K, m, C, H, W] and [K, b, C, H, W]; features [K, b, d].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dsvlib._validation import check_choice, check_number
from dsvlib.augmentation import DSA, AugmentationConfig
from dsvlib.classifiers.architectures import embed
from dsvlib.conditions import DISTANCES, Conditions, Distance, residuals
from dsvlib.data.datasets import AnySplit
from dsvlib.distillation._matching import Bounds, Matching, MatchingConfig, in_parts
from dsvlib.frozen import evaluation_mode
from dsvlib.solution import Solution


@dataclass(frozen=True, kw_only=True)
class DistributionMatchingConfig(MatchingConfig):
    """DM's settings, and those of the DeepKKT loss that a classifier adds.

    deepkkt_weight
        w, of L_kkt = D(θ, −Σλ∇L) + β1·L_primal on the synthetic images as they are. With D the
        cosine and rate 1, 1 is safe; at 100 the images run away.
    distance, primal_weight
        D and β1.
    multiplier_learning_rate, initial_multiplier
        Adam's rate and the start for λ, which is clamped at 0; rate 0 keeps it fixed.
    """

    steps: int = 20_000
    learning_rate: float = 1.0
    init: Literal["noise", "real"] = "real"
    augmentation: AugmentationConfig | None = DSA
    deepkkt_weight: float = 1.0
    distance: Distance = "cosine"
    primal_weight: float = 1.0
    multiplier_learning_rate: float = 0.01
    initial_multiplier: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("distance", self.distance, DISTANCES)
        check_number("initial_multiplier", self.initial_multiplier, above=0)
        for name in ("deepkkt_weight", "primal_weight", "multiplier_learning_rate"):
            check_number(name, getattr(self, name), at_least=0)


@torch.enable_grad()
def match_distributions(
    split: AnySplit,
    *,
    per_class: int,
    config: DistributionMatchingConfig | None = None,
    classifier: nn.Module | None = None,
    build_model: Callable[[], nn.Module] | None = None,
    bounds: Bounds | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """Make `per_class` images per class by matching mean features (DM; with a classifier, PDD).

    Parameters
    ----------
    split, build_model, bounds, generator
        As in `match_gradients`.
    classifier
        A trained network whose DeepKKT loss on the synthetic images is added, with multipliers λ
        of its own; read in evaluation mode and left as it was.

    Raises ValueError as `match_gradients` does, and for labels the classifier cannot have.
    Under the cosine λ is set to its best scale at the end. `residuals` are those of the classifier,
    or None without one.
    """
    config = config or DistributionMatchingConfig()
    run = Matching(split, per_class, config, bounds, generator, build_model)
    conditions = None if classifier is None else Conditions(classifier)

    def losses() -> Iterator[dict[str, Tensor]]:
        for _ in range(config.steps):
            network = run.fresh_network().requires_grad_(False)
            real, synthetic = run.batches()
            with torch.no_grad():
                target = _features(network, real)
            terms = {"matching": feature_distance(target, _features(network, synthetic))}
            if conditions is not None:
                kkt = conditions.terms(run.x, run.labels, run.multipliers, config.distance)
                terms |= {"stationarity": kkt.stationarity, "primal": kkt.primal}
            yield terms

    if classifier is None:
        return run.descend(losses(), config.steps)
    run.learn_multipliers(config.initial_multiplier, config.multiplier_learning_rate)
    weights = {
        "stationarity": config.deepkkt_weight,
        "primal": config.deepkkt_weight * config.primal_weight,
    }
    with evaluation_mode(classifier):
        solution = run.descend(losses(), config.steps, weights)
        if conditions is not None and config.distance == "cosine" and config.deepkkt_weight:
            run.multipliers = conditions.best_scaled(run.x, run.labels, run.multipliers)
    samples = run.samples()
    return replace(solution, samples=samples, residuals=residuals(classifier, samples))


def feature_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return Σ_c ‖mean first_c − mean second_c‖² (DM, Eq. 4), a scalar.

    Features [K, b, d] and [K, m, d].
    """
    return (first.mean(dim=1) - second.mean(dim=1)).square().sum()


def _features(network: nn.Module, images: Tensor) -> Tensor:
    """Return ψ of all classes, [K, b, d]."""
    parts = in_parts(network, images.flatten(0, 1))
    return torch.cat([embed(network, part) for part in parts]).unflatten(0, images.shape[:2])
