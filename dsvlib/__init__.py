"""Deep support vectors: the DeepKKT conditions of a trained classifier, and samples that meet them.

Public names are loaded on first use, so that the command line answers before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "analysis": ("entropy", "lambda_accuracy", "margin", "pearson"),
    "augmentation": ("DSA", "AugmentationConfig", "augment"),
    "checkpoints": ("load_classifier", "save_classifier"),
    "comparison": ("Difference", "difference", "holm"),
    "conditions": ("Residuals", "deepkkt_loss", "residuals", "weighted_gradient"),
    "datasets": ("Dataset", "Split", "load_dataset"),
    "distillation": (
        "DistributionMatchingConfig",
        "GradientMatchingConfig",
        "match_distributions",
        "match_gradients",
        "seen_images",
    ),
    "evaluation": ("Evaluation", "EvaluationConfig", "evaluate"),
    "judging": ("network_judge", "recognised", "svm_judge"),
    "models": ("build_model", "embed", "weights_only"),
    "multipliers": ("GradientConfig", "NNLSConfig", "fit_multipliers"),
    "priors": ("total_variation",),
    "ranking": ("best", "rank"),
    "run": ("Run",),
    "samples": ("SupportSet",),
    "selection": (
        "HitRecorder",
        "class_means",
        "forgetting",
        "forgetting_events",
        "herding",
        "k_center",
        "random_subset",
        "select",
    ),
    "solution": ("Certificate", "Solution", "Status"),
    "spectrum": ("band_pass", "radial_spectrum"),
    "sources": ("Classifier", "open_classifier"),
    "synthesis": ("SynthesisConfig", "synthesize"),
    "trail": ("multiplier_trail", "per_sample_gradients"),
    "training": ("TrainConfig", "accuracy", "train"),
    "zoo": ("RECIPES", "classifier", "premise"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` and return the public object."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dsvlib' has no attribute {name!r}")
    value = getattr(import_module(f"dsvlib.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
