"""What a report measures, stage by stage; what is finished is kept, so that a call can go on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dsvlib
from dsvlib._errors import explain as say_why
from dsvlib._files import atomic_path
from dsvlib._progress import progress_bar
from dsvlib.classifiers.foreign import Classifier
from dsvlib.classifiers.training import logits_of
from dsvlib.cli import preset_for
from dsvlib.data.datasets import Split
from dsvlib.gradients import GRAM_GIGABYTES
from dsvlib.multipliers import NNLSConfig
from dsvlib.support_set import SupportSet

MEMORY = 2.0  # gigabytes for the gradients of training images and their Gram matrix
MOST_IMAGES = int((MEMORY / GRAM_GIGABYTES) ** 0.5)  # what that Gram matrix admits
SUSPECTS, EACH, TOP = 20, 6, 5  # images shown: suspicious, right or wrong, of each prediction


class Stages:
    """Runs one stage after the other; keeps what is finished, and how long it took."""

    def __init__(self, folder: Any, key: str, echo: Callable[[str], object]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key, self.echo = key, echo
        self.seconds: dict[str, float] = {}

    def path(self, name: str) -> Path | None:
        """Return the file of a stage, None where nothing is kept."""
        return None if self.folder is None else self.folder / f"{name}-{self.key}"

    def __call__(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `make` does, or did in an earlier call of the same key."""
        path, head = self.path(name), f"{len(self.seconds) + 1} of 5 · {name}"
        if path is not None and path.is_file():
            kept: dict[str, Any] = torch.load(path, weights_only=True)
            self.echo(f"{head}: finished earlier, taken from {path.parent}")
        else:
            self.echo(head)
            begun = time.perf_counter()
            kept = make()
            kept["seconds"] = time.perf_counter() - begun
            if path is not None:
                with say_why("write", path), atomic_path(path) as temporary:
                    torch.save(kept, temporary)
        self.seconds[name] = kept.pop("seconds")
        return kept


def logits(model: nn.Module, parts: Mapping[str, Split]) -> dict[str, Any]:
    """Return the logits of each part."""
    return {
        name: torch.cat(
            [logits_of(model, batch).cpu()
             for batch in progress_bar(part.inputs.split(250), f"accuracy, {name}")]
        )
        for name, part in parts.items()
    }  # fmt: skip


def fitted(model: nn.Module, train: Split) -> dict[str, Any]:
    """Fit λ to the training images, and say how nearly they give the weights."""
    config = NNLSConfig(memory=MEMORY)
    found = dsvlib.fit_multipliers(model, train.inputs, train.labels, config=config)
    assert found.residuals is not None
    assert found.certificate is not None
    return {
        "multipliers": found.samples.multipliers.cpu(),
        "status": str(found.status),
        "stationarity": found.residuals.stationarity,
        "cosine": found.residuals.cosine,
        "per_layer": found.residuals.per_layer.to_dict("list"),
        "unique": bool(found.certificate.unique),
    }


def synthesised(
    opened: Classifier, labels: Tensor, seed: int, steps: Path | None
) -> dict[str, Any]:
    """Make the DSVs; a network that has no second derivative still gets the rest of its report."""
    if steps is not None:
        steps.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = dsvlib.synthesize(
            opened.model,
            labels,
            opened.shape,
            config=preset_for(opened)(),
            bounds=opened.bounds,
            generator=torch.Generator().manual_seed(seed),
            checkpoint=steps,
            checkpoint_every=25,
        )
    except ValueError as error:
        return {"status": f"None could be made: {error}."}
    samples = found.samples.to("cpu")
    names = ("inputs", "labels", "multipliers")
    read = logits_of(opened.model, samples.inputs).argmax(dim=1).cpu()
    wrong = int((read != samples.labels).sum())
    reading = "all of them" if not wrong else f"{len(read) - wrong} of {len(read)}"
    said = f"{found.status} The classifier itself reads {reading} as what they were made for."
    return {"samples": {name: getattr(samples, name).detach() for name in names}, "status": said}


def to_explain(predicted: Tensor, labels: Tensor, wanted: Tensor, seed: int) -> Tensor:
    """Return the places of a few test images that are classified right, and of a few wrong."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.isin(labels[order], wanted)]
    right = (predicted == labels)[order]
    return torch.cat([order[right][:EACH], order[~right][:EACH]])


def explained(model: nn.Module, inputs: Tensor, support: SupportSet) -> dict[str, Any]:
    """Return the predictions at `inputs` as sums over the training images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the sum leaves out stands on the page
        return dict(vars(dsvlib.explain(model, inputs, support)))


def suspected(model: nn.Module, support: SupportSet) -> dict[str, Any]:
    """Return the training images that hold their labels mostly by themselves, and their scores."""
    table = dsvlib.suspicious(model, support).head(SUSPECTS)
    return {str(name): column.tolist() for name, column in table.items()}
