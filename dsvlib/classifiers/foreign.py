"""Where a classifier comes from: our files, torchvision's weights by name, or one's own network.

Whatever the source, the same comes back: a network in evaluation mode, its class names, and how
pixels in [0, 1] become its inputs, x = (pixel − mean) / std.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvlib._validation import check_same_length, suggestion
from dsvlib.classifiers.architectures import ModelSpec
from dsvlib.classifiers.files import load_classifier

TORCHVISION = "torchvision:"


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained network and how to read it: any `nn.Module` from images to logits [n, K].

    Parameters
    ----------
    model
        Maps inputs [n, C, H, W] to logits [n, K].
    classes
        The K class names, in the order of the logits.
    mean, std
        Normalisation of each of the C channels for pixels in [0, 1].
    shape
        One input's (C, H, W).
    name, dataset
        What it is called and what it was trained on, where known.

    Raises ValueError where mean, std and shape disagree in channels, or a std is not positive.
    """

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    name: str = ""
    dataset: str = ""

    def __post_init__(self) -> None:
        for field, kind in (("classes", str), ("mean", float), ("std", float), ("shape", int)):
            object.__setattr__(self, field, tuple(kind(v) for v in getattr(self, field)))
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(
                f"shape: expected (channels, height, width), got {self.shape}; e.g. (3, 32, 32)"
            )
        if not len(self.mean) == len(self.std) == self.shape[0] or min(self.std) <= 0:
            raise ValueError(
                f"mean and std: expected {self.shape[0]} numbers each, one per channel, with "
                f"std > 0, got mean {self.mean} and std {self.std}; take those that the network "
                f"was trained with"
            )
        if not self.classes:
            raise ValueError("classes: expected one name per logit, got none; name the classes")

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest valid pixel in normalised units, each [C]."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (0 - mean) / std, (1 - mean) / std

    def reading(
        self, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> nn.Module:
        """Return a network that reads inputs of another size (C, H, W) and normalisation.

        Pixels are resized bilinearly where the sizes differ, so that a classifier can judge what
        was made for another one. Raises ValueError where the channels differ.
        """
        if not self.shape[0] == shape[0] == len(mean) == len(std):
            raise ValueError(
                f"expected {self.shape[0]} channels, as {self.name or 'the classifier'} reads, got "
                f"{shape[0]} with {len(mean)} means and {len(std)} stds; convert the images before"
            )
        return _Reading(self, mean, std).eval()

    def labels(self, wanted: Sequence[int | str]) -> Tensor:
        """Return class numbers [n] for names or numbers; an unknown name suggests the nearest."""
        return torch.tensor([self._number(item) for item in wanted])

    def _number(self, item: int | str) -> int:
        count = len(self.classes)
        text = str(item).strip()
        if text.lstrip("-").isdigit():
            if not 0 <= int(text) < count:
                raise ValueError(
                    f"labels: expected numbers from 0 to {count - 1}, got {text}; "
                    f"the classifier has {count} classes"
                )
            return int(text)
        if self.classes.count(text) > 1:
            raise ValueError(
                f"labels: expected a name of one class, got {text!r}, which several share; "
                f"give its number"
            )
        if text not in self.classes:
            near = suggestion(text, self.classes) or f"; the first is {self.classes[0]!r}"
            raise ValueError(f"labels: expected names or numbers of classes, got {text!r}{near}")
        return self.classes.index(text)


class _Reading(nn.Module):
    """A classifier behind a change of normalisation and size."""

    scale: Tensor
    offset: Tensor

    def __init__(self, source: Classifier, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        theirs, ours = ((source.mean, source.std), (mean, std))
        a, b, c, d = (torch.tensor(v).view(-1, 1, 1) for v in (*theirs, *ours))
        self.register_buffer("scale", d / b)  # pixel = x·d + c, their input = (pixel − a) / b
        self.register_buffer("offset", (c - a) / b)
        self.size, self.model = source.shape[1:], source.model

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [n, K]."""
        theirs = inputs * self.scale + self.offset
        if inputs.shape[2:] != self.size:
            theirs = F.interpolate(theirs, self.size, mode="bilinear")
        logits: Tensor = self.model(theirs)
        return logits


def open_classifier(
    source: str | os.PathLike[str] | Callable[[], nn.Module],
    *,
    weights: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Classifier:
    """Return a classifier from a file, from torchvision or from code of one's own.

    Parameters
    ----------
    source
        A file that `save_classifier` wrote, or a shipped one by name (``"digits-convnet"``);
        ``"torchvision:resnet50"`` for its default weights or
        ``"torchvision:ResNet50_Weights.IMAGENET1K_V2"`` for named ones, downloaded on first use
        and checked against torchvision's checksum; or ``"MODULE:CALLABLE"``, or the callable
        itself, which returns the network when it is called without arguments.
    weights
        A local state dict for it (.safetensors, or what `torch.save` wrote, read without pickled
        code) instead of a download.
    classes, mean, std, shape
        As in `Classifier`; needed for one's own network, and replace what is known of the others.
    root
        A folder in which shipped ones are looked for too.

    Raises ValueError for an unknown name or weights of another architecture, naming the first key
    that does not fit; FileNotFoundError for a missing file; RuntimeError for a failed download.
    """
    known: dict[str, Any]
    given: dict[str, Any] = {"classes": classes, "mean": mean, "std": std, "shape": shape}
    given = {key: value for key, value in given.items() if value is not None}
    if callable(source):
        model, known = source(), {"name": getattr(source, "__name__", "own")}
    elif str(source).startswith(TORCHVISION):
        model, known = _from_torchvision(str(source)[len(TORCHVISION) :], weights, given)
    elif ":" in str(source) and not Path(source).exists():
        model, known = _from_code(str(source))(), {"name": str(source)}
    else:
        model, metadata = load_classifier(source, root=root)
        kept = ("classes", "mean", "std", "shape", "dataset")
        known = {key: metadata[key] for key in kept if key in metadata}
        known |= {"name": Path(source).stem}
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{known['name']}: expected a callable that returns a torch.nn.Module, got "
            f"{type(model).__name__}; write a function without arguments that builds the network"
        )
    if weights is not None:
        load_weights(model, weights)
    known |= given
    missing = [key for key in ("classes", "mean", "std", "shape") if key not in known]
    if missing:
        raise ValueError(
            f"{known['name']}: expected {', '.join(missing)} beside the network, got none; "
            f"say how its inputs are normalised and what its classes are called"
        )
    opened = Classifier(model.eval(), **known)
    spec = getattr(model, "spec", None)
    if isinstance(spec, ModelSpec):
        check_same_length(classes=len(opened.classes), logits=spec.num_classes)
    return opened


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a local state dict into `model`; the model is not touched if it does not fit.

    Reads .safetensors, and files of `torch.save` with `weights_only=True`. A dict under the key
    ``state_dict`` or ``model`` is unwrapped, and the prefix ``module.`` of data-parallel training
    is taken off.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one or one of another
    architecture: the message has the first key that does not fit.
    """
    state = _read_state(Path(path))
    own = model.state_dict()
    problems = [f"no {key!r}" for key in own if key not in state]
    problems += [f"{key!r}, which the network lacks" for key in state if key not in own]
    shapes = ((key, own[key].shape, state[key].shape) for key in own if key in state)
    wrong = [
        f"{list(got)} for {key!r}, expected {list(wanted)}"
        for key, wanted, got in shapes
        if wanted != got
    ]
    found = [*wrong, *problems]
    if found:
        others = f" and {len(found) - 1} more that do not fit" if len(found) > 1 else ""
        raise ValueError(
            f"{path}: expected weights of {type(model).__name__}, got {found[0]}{others}; "
            f"name the architecture that the file was written for"
        )
    model.load_state_dict(state)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of weights, found none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises nearly anything, and all of it means this
        raise ValueError(
            f"{path}: expected .safetensors or a state dict from torch.save, got a file that "
            f"cannot be read without running code in it ({type(error).__name__}); "
            f"save model.state_dict() again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path}: expected a state dict, names and tensors, got {type(state).__name__}; "
            f"save model.state_dict()"
        )
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _from_torchvision(
    name: str, local: object, given: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return torchvision's network by name, with class names and normalisation of its weights."""
    from torchvision import models

    found = {architecture: models.get_model_weights(architecture)
             for architecture in models.list_models(models)}  # fmt: skip
    families = {weights.__name__: architecture for architecture, weights in found.items()}
    family, _, entry = name.partition(".")
    architecture = families.get(family, family)
    if architecture not in found:
        raise ValueError(
            f"torchvision: expected one of its classifiers or weights, got {name!r}"
            f"{suggestion(name, [*found, *families])}"
        )
    choices = found[architecture]
    if entry and entry not in choices.__members__:
        raise ValueError(
            f"torchvision: expected {family} with one of {', '.join(choices.__members__)}, got "
            f"{entry!r}{suggestion(entry, choices.__members__)}"
        )
    chosen = choices[entry] if entry else choices.DEFAULT
    preset = chosen.transforms()
    side = int(preset.crop_size[0])
    known = {
        "classes": tuple(chosen.meta["categories"]),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "shape": (3, side, side),
        "name": str(chosen),
        "dataset": "imagenet",
    }
    count = len(given.get("classes", known["classes"]))
    with torch.random.fork_rng():  # initial weights are drawn only to be replaced
        extra = {"init_weights": False} if architecture in ("googlenet", "inception_v3") else {}
        model: nn.Module = models.get_model(architecture, weights=None, num_classes=count, **extra)
    if local is None:
        try:
            state = chosen.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"{chosen}: expected to download {chosen.url} with its checksum, got: {error}; "
                f"fetch the file elsewhere and name it as the local weights"
            ) from error
        model.load_state_dict(state)
    return model, known


def _from_code(text: str) -> Callable[[], Any]:
    """Return the callable that 'MODULE:CALLABLE' names; the working folder is searched too."""
    module, _, name = text.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{text}: expected MODULE:CALLABLE with a module that can be imported, got: {error}; "
            f"run it where the module lies"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(getattr(found, name, None)):
        near = suggestion(name, [n for n in dir(found) if not n.startswith("_")])
        raise ValueError(f"{text}: expected a callable in {module}, got {name!r}{near}")
    return getattr(found, name)  # type: ignore[no-any-return]
