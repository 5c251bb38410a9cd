"""What a report reads: a classifier, and a data set as it reads it; the rest is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dsvlib
from dsvlib._errors import RequestError
from dsvlib._resume import value_digest
from dsvlib.classifiers.foreign import TORCHVISION, Classifier
from dsvlib.classifiers.training import logits_of
from dsvlib.data.datasets import Dataset, Split
from dsvlib.data.downloads import KNOWN
from dsvlib.data.folders import images_of, part_folder

MOST_MADE = 300  # DSVs on one page


def opened_with(
    classifier: Any, data: Any, root: Any, opening: Mapping[str, Any]
) -> tuple[Classifier, Dataset]:
    """Return the classifier and the data set as it reads it: its normalisation, its labels."""
    given = {key: value for key, value in opening.items() if value is not None}
    own = _is_own(classifier) or "weights" in given
    if isinstance(classifier, Classifier):
        opened = classifier
    elif not own:  # first what is quickly refused
        opened = dsvlib.open_classifier(classifier, root=root, **given)
    loaded = data if isinstance(data, Dataset) else _loaded(str(data), root)
    if own:
        given = {"classes": loaded.classes, "shape": loaded.shape} | given
        opened = dsvlib.open_classifier(classifier, root=root, **given)
    if sorted(opened.classes) != sorted(loaded.classes):
        raise RequestError(
            f"data: expected the classes of the classifier, {_short(opened.classes)}, got "
            f"{_short(loaded.classes)}; name the folders of images as the classifier does"
        )
    if opened.shape != loaded.shape:
        reads, got = ("×".join(map(str, shape)) for shape in (opened.shape, loaded.shape))
        raise RequestError(
            f"data: expected images {reads} as the classifier reads them, got {got}; resize them "
            f"first, or take another classifier"
        )
    like = next((p for p in opened.model.parameters() if p.is_floating_point()), torch.zeros(()))
    place = torch.tensor([opened.classes.index(name) for name in loaded.classes])
    if opened.classes == loaded.classes:  # also where several share a name
        place = torch.arange(len(place))
    column = {key: torch.tensor(getattr(opened, key)).view(-1, 1, 1) for key in ("mean", "std")}

    def read(part: Split) -> Split:
        inputs = part.inputs
        if (loaded.mean, loaded.std) != (opened.mean, opened.std):
            inputs = (loaded.denormalize(inputs) - column["mean"]) / column["std"]
        return Split(inputs.to(like.dtype), place[part.labels], opened.mean, opened.std)

    train, test = read(loaded.train), read(loaded.test)
    count = logits_of(opened.model, test.inputs[:2]).shape[1]
    if count != len(opened.classes):
        raise RequestError(
            f"classifier: expected a logit for each of {len(opened.classes)} classes, got {count}; "
            f"give the network one for each"
        )
    return opened, replace(loaded, classes=opened.classes, mean=opened.mean, std=opened.std,
                           train=train, test=test)  # fmt: skip


def _is_own(classifier: Any) -> bool:
    """Whether it is code of one's own, which does not say what its classes are called."""
    if not isinstance(classifier, str | os.PathLike):
        return callable(classifier)
    named = str(classifier)
    return ":" in named and not named.startswith(TORCHVISION) and not Path(named).exists()


def _loaded(name: str, root: Any) -> Dataset:
    if name not in KNOWN and not name.startswith("folder:") and Path(name).is_dir():
        name = f"folder:{name}"
    try:
        return dsvlib.load_dataset(name, root=root)
    except (ValueError, FileNotFoundError) as error:
        raise RequestError(f"data: {error}") from error


def wanted(opened: Classifier, classes: Sequence[int | str] | None, per_class: int) -> Tensor:
    """Return the numbers of the classes to show, each once."""
    every = torch.arange(len(opened.classes))
    try:
        wanted = every if classes is None else opened.labels(classes).unique()
    except (ValueError, TypeError) as error:
        raise RequestError(str(error).replace("labels:", "classes:", 1)) from None
    if not len(wanted) or len(wanted) * per_class > MOST_MADE:
        raise RequestError(
            f"classes: expected from 1 to {MOST_MADE} DSVs on a page, got {len(wanted)} classes "
            f"of {per_class} each; name some classes, or ask for fewer of each"
        )
    return wanted


def _short(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" * (len(names) > 3))


def file_names(data: object, loaded: Dataset) -> list[str] | None:
    """Return the training images' files in a folder, in the data set's order; None for others."""
    folder = Path(str(data).removeprefix("folder:"))
    if isinstance(data, Dataset) or str(data) in KNOWN or not folder.is_dir():
        return None
    where = part_folder(folder, "train")
    found = [file for name in sorted(loaded.classes) for file in images_of(where / name)]
    names = [str(file.relative_to(where)) for file in found]
    return names if len(names) == len(loaded.train) else None


def digest(model: nn.Module, train: Split, test: Split, *settings: object) -> str:
    """Return what tells one call from another: network, images, labels and settings."""
    images = (train.inputs, train.labels, test.inputs, test.labels)
    return value_digest((str(model), settings, model.state_dict(), images))[:16]
