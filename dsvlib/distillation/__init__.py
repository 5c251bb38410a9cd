"""Dataset distillation by matching, from the real images that may be seen."""

from dsvlib.distillation._matching import seen_images
from dsvlib.distillation.distribution_matching import (
    DistributionMatchingConfig,
    feature_distance,
    match_distributions,
)
from dsvlib.distillation.gradient_matching import (
    GradientMatchingConfig,
    gradient_distance,
    match_gradients,
)

__all__ = [
    "DistributionMatchingConfig",
    "GradientMatchingConfig",
    "feature_distance",
    "gradient_distance",
    "match_distributions",
    "match_gradients",
    "seen_images",
]
