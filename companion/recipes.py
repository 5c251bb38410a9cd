"""The classifiers that ship with the project, and the recipes that make them again.

A recipe is data set, architecture, training and seed: everything that a stranger needs to repeat a
checkpoint. `classifier(name, data)` loads the shipped weights; `retrain=True` follows the recipe.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dsvlib._files import atomic_path, checkpoints_folder, file_digest
from dsvlib._validation import check_choice
from dsvlib.augmentation import AugmentationConfig
from dsvlib.classifiers.adversarial import AdversarialConfig, attack
from dsvlib.classifiers.architectures import build_model
from dsvlib.classifiers.files import DIGESTS, load_classifier, save_classifier, shipped_digests
from dsvlib.classifiers.training import TrainConfig, accuracy, train
from dsvlib.conditions import residuals
from dsvlib.data.datasets import Dataset, Split, load_dataset
from dsvlib.logits import cross_entropy
from dsvlib.support_set import SupportSet
from dsvlib.synthesis import BLACK


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a shipped classifier was trained, and what for."""

    purpose: str
    dataset: str
    training: TrainConfig
    architecture: str = "convnet"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    shuffle_labels: bool = False
    image_size: int | None = None  # side that the images are resized to; None: as they are
    start: str | None = None  # the recipe whose weights training starts from; None: fresh ones

    @property
    def is_rounded(self) -> bool:
        """Whether the weights are rounded to float16, which takes half of the space."""
        return self.dataset != "digits"


ATTACK_STEPS, ATTACKED = 20, 2000  # of the attack that robustness is measured by, and test images
_SMALL: dict[str, Any] = {"width": 32, "depth": 2, "norm": "none"}
_DEEP: dict[str, Any] = {"width": 64, "depth": 4}
_JUDGE: dict[str, Any] = {"architecture": "resnet18", "options": {"width": 16}, "seed": 1000}


def _shifted(by: float) -> AugmentationConfig:
    return AugmentationConfig(flip=0.5, translate=by)


def _cycle(epochs: int, learning_rate: float, weight_decay: float, **options: Any) -> TrainConfig:
    """Return the training of photographs: one cycle of the rate, and flips by default."""
    return TrainConfig(
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule="one-cycle",
        **{"augmentation": _shifted(0)} | options,
    )


def _against(radius: float, *, epochs: int, **options: Any) -> TrainConfig:
    """Return the training on images moved against the classifier by one step of ℓ2 `radius`."""
    return _cycle(epochs, 0.08, 1e-3, adversarial=AdversarialConfig(radius=radius), **options)


def _for_judging(epochs: int) -> TrainConfig:
    """Return the training of the judges of 32×32 photographs."""
    return _cycle(epochs, 0.1, 5e-4, augmentation=_shifted(0.125), precision="bfloat16")


def _for_accuracy(epochs: int) -> TrainConfig:
    """Return the training of the field's ConvNet-3."""
    shifted = _shifted(0.09375)
    return _cycle(epochs, 0.05, 7.5e-4, batch_size=64, augmentation=shifted, precision="bfloat16")


# data/README.md tells how these settings were found.
RECIPES = {
    "digits-convnet": Recipe(
        purpose="the embedded default: norm-free and trained until it is nearly stationary",
        dataset="digits",
        options=_SMALL,
        training=TrainConfig(
            epochs=200, learning_rate=0.05, weight_decay=5e-3, polish_steps=300, log_every=20
        ),
    ),
    "digits-convnet-shuffled": Recipe(
        purpose="control: the same network, made to memorise labels that were shuffled",
        dataset="digits",
        options=_SMALL,
        # little decay and more epochs: at the first recipe's decay it would learn nothing
        training=TrainConfig(epochs=400, learning_rate=0.05, weight_decay=1e-4, log_every=40),
        shuffle_labels=True,
    ),
    "digits-robust": Recipe(
        purpose="the same network, trained on digits moved against it (ℓ2, 1): pictures one reads",
        dataset="digits",
        options=_SMALL,
        training=TrainConfig(
            epochs=100,
            learning_rate=0.05,
            weight_decay=1e-3,
            adversarial=AdversarialConfig(radius=1.0, steps=2),
            log_every=10,
        ),
    ),
    "digits-vit": Recipe(
        purpose="a vision transformer of 18,602 parameters, for notebook 11",
        dataset="digits",
        architecture="vit",
        options={"patch": 4, "width": 32, "depth": 2, "heads": 4},
        training=TrainConfig(
            epochs=150, learning_rate=0.05, weight_decay=1e-3, polish_steps=100, log_every=20
        ),
    ),
    "digits-judge": Recipe(
        purpose="judge: another architecture, other weights, trained on the real digits only",
        dataset="digits",
        options={"width": 48, "depth": 3, "norm": "instance"},
        training=TrainConfig(
            epochs=40,
            batch_size=64,
            optimizer="adam",
            learning_rate=2e-3,
            augmentation=AugmentationConfig(translate=0.0625, fill=BLACK),
            log_every=10,
        ),
        seed=1000,
    ),
    "cifar10-convnet": Recipe(
        purpose="32×32 photographs: the field's ConvNet-3 (width 128, instance norm), for accuracy",
        dataset="cifar10",
        training=_for_accuracy(30),
    ),
    "cifar10-ordinary": Recipe(
        purpose="32×32 photographs: norm-free, with a decay that has taken hold when training ends",
        dataset="cifar10",
        options={"norm": "none", "width": 64},
        training=_cycle(22, 0.06, 3e-3, precision="bfloat16"),
    ),
    "cifar10-stationary": Recipe(
        purpose="32×32 photographs: `cifar10-ordinary` brought nearer to a stationary point",
        dataset="cifar10",
        options={"norm": "none", "width": 64},
        # averaged against the noise of the batches; no augmentation, since the condition has none
        training=TrainConfig(
            epochs=12, learning_rate=1e-2, weight_decay=3e-3, schedule="halfway", average_epochs=4
        ),
        start="cifar10-ordinary",
    ),
    "cifar10-robust": Recipe(
        purpose="32×32 photographs: norm-free, trained on images moved against it (ℓ2, 0.5)",
        dataset="cifar10",
        options={"norm": "none"},
        training=_against(0.5, epochs=9, precision="bfloat16"),
    ),
    "cifar10-robust-64": Recipe(
        purpose="the same of half the width and fewer epochs: a worse classifier, a better teacher",
        dataset="cifar10",
        options={"norm": "none", "width": 64},
        training=_against(0.5, epochs=5),
    ),
    "cifar10-judge": Recipe(
        purpose="judge of 32×32 photographs: a ResNet-18 of a quarter of the width",
        dataset="cifar10",
        **_JUDGE,
        training=_for_judging(10),
    ),
    "cifar100-robust": Recipe(
        purpose="a hundred classes of 32×32 photographs: norm-free, images moved (ℓ2, 0.25)",
        dataset="cifar100",
        options={"norm": "none", "width": 64},
        training=_against(0.25, epochs=10, precision="bfloat16"),
    ),
    "cifar100-judge": Recipe(
        purpose="judge of the hundred classes: a ResNet-18 of a quarter of the width",
        dataset="cifar100",
        **_JUDGE,
        training=_for_judging(8),
    ),
    "cifar100-convnet": Recipe(
        purpose="a hundred classes of 32×32 photographs: the field's ConvNet-3, instance norm",
        dataset="cifar100",
        training=_for_accuracy(15),
    ),
    "imagenette-64-convnet": Recipe(
        purpose="64×64 photographs: norm-free, as `cifar10-ordinary` one block deeper",
        dataset="imagenette-64",
        options=_DEEP | {"norm": "none"},
        # 9,469 images: small batches give the steps that learning takes
        training=_cycle(16, 0.04, 2e-3, batch_size=32),
    ),
    "imagenette-64-resnet18": Recipe(
        purpose="64×64 photographs: a ResNet-18 of half the width, its stem halving the image once",
        dataset="imagenette-64",
        architecture="resnet18",
        options={"width": 32, "stride": 2},
        training=_cycle(14, 0.1, 2e-3, batch_size=64, augmentation=_shifted(0.0625)),
    ),
    "imagenette-64-robust": Recipe(
        purpose="64×64 photographs: `imagenette-64-convnet` trained on images moved (ℓ2, 1)",
        dataset="imagenette-64",
        options=_DEEP | {"norm": "none"},
        training=_against(1.0, epochs=12, batch_size=64, precision="bfloat16"),
    ),
    "imagenette-64-judge": Recipe(
        purpose="judge of Imagenette: at half the size, with batch norm and max pooling",
        dataset="imagenette-64",
        image_size=32,  # which also makes it more of a stranger to what it reads
        options=_DEEP | {"norm": "batch", "pooling": "max"},
        training=_cycle(16, 0.08, 5e-4, batch_size=64, augmentation=_shifted(0.125)),
        seed=1000,
    ),
}


def classifier(
    name: str,
    data: Dataset,
    *,
    retrain: bool = False,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a classifier by recipe name with its metadata, in evaluation mode, on the CPU.

    Parameters
    ----------
    data
        The data set that the recipe names, or for shipped weights one of the same classes.
    retrain
        Follow the recipe instead of loading the shipped weights.
    seed
        Another seed than the recipe's for weights and batches; implies training.
    device
        Where to train.

    Raises ValueError for an unknown name or another data set than the recipe's.
    """
    check_choice("name", name, RECIPES)
    recipe = RECIPES[name]
    if not retrain and seed is None:
        model, metadata = load_classifier(name)
        if metadata.get("dataset") != recipe.dataset:
            raise ValueError(
                f"{name}: expected a classifier of {recipe.dataset!r}, as its recipe says, got one "
                f"of {metadata.get('dataset')!r}; run dsv train {name}"
            )
        if data.name == recipe.dataset or list(data.classes) == list(metadata["classes"]):
            return model, metadata
    if data.name != recipe.dataset:
        raise ValueError(
            f"data: expected {recipe.dataset!r} for the recipe {name!r}, got {data.name!r}; "
            f"load it with load_dataset"
        )
    return _follow(recipe, data, recipe.seed if seed is None else seed, device)


def equal_multipliers(model: nn.Module, split: Split, weight_decay: float) -> SupportSet:
    """Return the training set with the multipliers that a stationary point would have.

    θ = −(1/(w·n)) Σ ∇Lᵢ, so λᵢ = 1/(w·n) for every sample; `residuals` of it says how nearly the
    classifier was trained to such a point.
    """
    multipliers = torch.full((len(split),), 1 / (weight_decay * len(split)))
    device = next(model.parameters()).device
    return SupportSet(split.inputs, split.labels, multipliers).to(device)


def _follow(
    recipe: Recipe, data: Dataset, seed: int, device: torch.device | str
) -> tuple[nn.Module, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    split = data.train
    if recipe.shuffle_labels:
        split = Split(split.inputs, split.labels[torch.randperm(len(split), generator=generator)])
    if recipe.start is not None:  # the shipped weights, or those of the same other seed
        model, _ = classifier(recipe.start, data, seed=None if seed == recipe.seed else seed)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build_model(
                recipe.architecture,
                num_classes=len(data.classes),
                shape=data.shape,
                **recipe.options,
            )
    train(model.to(device), split, config=recipe.training, generator=generator)
    if recipe.is_rounded:
        model.half().float()
    condition = residuals(model, equal_multipliers(model, split, recipe.training.weight_decay))
    metadata = {
        "dataset": data.name,
        "data_digest": data.digest,
        "classes": data.classes,
        "mean": data.mean,
        "std": data.std,
        "recipe": asdict(recipe) | {"seed": seed},
        "train_accuracy": accuracy(model, split),
        "test_accuracy": accuracy(model, data.test),
        "stationarity": condition.stationarity,
        "cosine": condition.cosine,
    }
    if recipe.training.adversarial is not None:
        metadata |= _robustness(model, data, recipe.training)
    return model.cpu().eval(), metadata


def _robustness(model: nn.Module, data: Dataset, training: TrainConfig) -> dict[str, Any]:
    """Return how a robust classifier stands against stronger attacks, and its own condition.

    It was trained on moved images: there its loss is the one that training made stationary.
    """
    own = training.adversarial
    assert own is not None
    strong = AdversarialConfig(radius=own.radius, steps=ATTACK_STEPS)
    some = data.test[:ATTACKED]
    condition = residuals(
        model, equal_multipliers(model, _moved(model, data.train, own), training.weight_decay)
    )
    return {
        "robust_accuracy": accuracy(model, _moved(model, some, strong)),
        "attack": asdict(strong) | {"test_images": len(some)},
        "stationarity_attacked": condition.stationarity,
        "cosine_attacked": condition.cosine,
    }


def _moved(model: nn.Module, split: Split, config: AdversarialConfig) -> Split:
    """Return the images of a split, each moved against the model."""
    generator, split = torch.Generator().manual_seed(0), split.to(next(model.parameters()).device)
    parts = [
        attack(
            model, split.inputs[part], split.labels[part], config=config, mean=split.mean,
            std=split.std, loss_fn=cross_entropy, generator=generator,
        )
        for part in torch.arange(len(split)).split(500)
    ]  # fmt: skip
    return replace(split, inputs=torch.cat(parts))


def is_shipped(name: str) -> bool:
    """Return whether data/checkpoints holds a classifier that was made by its present recipe."""
    path = checkpoints_folder() / f"{name}.safetensors"
    if not path.is_file():
        return False
    recorded = load_classifier(path)[1].get("recipe")
    return bool(recorded == _at_that_time(json.loads(json.dumps(asdict(RECIPES[name]))), recorded))


def _at_that_time(now: Any, recorded: Any) -> Any:
    """Return the settings without those that came later, which have no entry in the header."""
    if not isinstance(recorded, dict) or not isinstance(now, dict):
        return now
    return {key: _at_that_time(now.get(key), value) for key, value in recorded.items()}


def train_shipped(
    name: str, *, root: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Train a shipped classifier anew, put it into data/checkpoints and return its metadata."""
    check_choice("name", name, RECIPES)
    recipe = RECIPES[name]
    data = load_dataset(recipe.dataset, root=root, image_size=recipe.image_size)
    model, metadata = classifier(name, data, retrain=True, device=device)
    path = checkpoints_folder() / f"{name}.safetensors"
    save_classifier(path, model.half() if recipe.is_rounded else model, **metadata)
    digests = shipped_digests() | {path.name: file_digest(path)}
    with atomic_path(DIGESTS) as temporary:
        temporary.write_text("".join(f"{digests[k]}  {k}\n" for k in sorted(digests)))
    return metadata
