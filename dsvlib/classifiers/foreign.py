"""Where a classifier comes from: our files, torchvision's weights by name, or one's own network.

Whatever the source, the same comes back: a network in evaluation mode, its class names, and how
pixels in [0, 1] become its inputs, x = (pixel − mean) / std.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvlib._files import foreign_content
from dsvlib._validation import check_shaped, suggestion
from dsvlib.classifiers.files import check_state, load_classifier
from dsvlib.frozen import evaluation_mode, read_logits, unwrapped
from dsvlib.support_set import Normalised

TORCHVISION = "torchvision:"
CONTAINERS = ("state_dict", "model_state_dict", "model", "net")  # of a file's dict
PREFIXES = ("module.", "model.", "net.")


@dataclass(frozen=True, eq=False)
class Classifier(Normalised):
    """A trained network and how to read it: any `nn.Module` from images to logits [n, K].

    Parameters
    ----------
    model
        Maps inputs [n, C, H, W] to logits [n, K]; taken out of what DataParallel or torch.compile
        wrapped around it.
    classes
        The K class names, in the order of the logits; or a dict, of numbers to names or of names
        to numbers.
    mean, std
        Normalisation of each of the C channels for pixels in [0, 1].
    shape
        One input's (C, H, W).
    name, dataset
        What it is called and what it was trained on, where known.

    One forward pass of two grey images checks that the network reads `shape` and has a logit for
    every class. Raises ValueError where it does not, where mean, std and shape disagree in
    channels or a mean or std is none of pixels in [0, 1]; TypeError for a string or a set.
    """

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    name: str = ""
    dataset: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", unwrapped(self.model)[0])
        object.__setattr__(self, "classes", _class_names(self.classes))
        for field, kind in (("mean", float), ("std", float), ("shape", index)):
            object.__setattr__(self, field, _numbers(field, getattr(self, field), kind))
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(
                f"shape: expected (channels, height, width), got {self.shape}; e.g. (3, 32, 32)"
            )
        if not len(self.mean) == len(self.std) == self.shape[0] or not min(self.std) > 0:
            raise ValueError(
                f"mean and std: expected {self.shape[0]} numbers each, one per channel, with "
                f"std > 0, got mean {self.mean} and std {self.std}; take those that the network "
                f"was trained with"
            )
        _check_unit_range(self.mean, self.std)
        if not self.classes:
            raise ValueError("classes: expected one name per logit, got none; name the classes")
        logits = _count_logits(self.model, self.shape, self.name or "model")
        if len(self.classes) not in ((1, 2) if logits == 1 else (logits,)):  # one tells two apart
            raise ValueError(
                f"classes: expected one name for each logit, got classes "
                f"{len(self.classes)}, logits {logits}; name those that the network has"
            )

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
        _check_unit_range(mean, std)
        return _Reading(self, mean, std).eval()

    def reads(self, shape: Sequence[int]) -> bool:
        """Whether the network also reads inputs of this shape (C, H, W)."""
        try:
            return _count_logits(self.model, shape, self.name) >= 1
        except ValueError:
            return False

    def labels(self, wanted: Sequence[int | str]) -> Tensor:
        """Return class numbers [n] for names or numbers; an unknown name suggests the nearest.

        A string that is the name of a class means it, ``"1"`` too; any other that is a number, and
        every int, is the class's place among the logits.
        """
        if isinstance(wanted, str):
            raise TypeError(
                f"labels: expected a list of names or numbers, got the string {wanted!r}; "
                f"write [{wanted!r}]"
            )
        return torch.tensor([self._number(item) for item in wanted])

    def _number(self, item: int | str) -> int:
        count = len(self.classes)
        name = item if item in self.classes else str(item).strip()
        if isinstance(item, str) and name in self.classes:
            if self.classes.count(name) > 1:
                raise ValueError(
                    f"labels: expected a name of one class, got {name!r}, which several share; "
                    f"give its number"
                )
            return self.classes.index(name)
        if not str(name).lstrip("-").isdigit():
            near = suggestion(str(name), self.classes) or f"; the first is {self.classes[0]!r}"
            raise ValueError(f"labels: expected names or numbers of classes, got {item!r}{near}")
        if not 0 <= int(name) < count:
            raise ValueError(
                f"labels: expected numbers from 0 to {count - 1}, got {name}; "
                f"the classifier has {count} classes"
            )
        return int(name)


def _class_names(classes: object) -> tuple[str, ...]:
    if isinstance(classes, str | bytes | set | frozenset) or not isinstance(classes, Iterable):
        raise TypeError(
            f"classes: expected a list of names in the order of the logits, got "
            f"{type(classes).__name__} {classes!r}; write a list, also of one"
        )
    if not isinstance(classes, Mapping):
        return tuple(map(str, classes))
    pairs = list(classes.items())
    if all(isinstance(k, str) and isinstance(v, int) for k, v in pairs):  # names to numbers
        pairs = [(number, name) for name, number in pairs]
    by_number = {str(number).strip(): str(name) for number, name in pairs}
    try:
        return tuple(by_number[str(number)] for number in range(len(pairs)))
    except KeyError as error:
        raise ValueError(
            f"classes: expected a dict with every number from 0 to {len(pairs) - 1}, got none "
            f"for {error}; name the classes in the order of the logits"
        ) from None


def _check_unit_range(mean: Sequence[float], std: Sequence[float]) -> None:
    if not all(value <= 1 for value in (*mean, *std)):  # a NaN fails it too
        raise ValueError(
            f"mean and std: expected those of pixels in [0, 1], got mean {mean} and std {std}; "
            f"divide by 255 what was taken of pixels from 0 to 255"
        )


def _numbers(field: str, values: object, kind: Callable[[Any], Any]) -> tuple[Any, ...]:
    try:
        if isinstance(values, str | bytes | set | frozenset | Mapping):
            raise TypeError("no order of channels")
        return tuple(kind(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{field}: expected a list of numbers, got {type(values).__name__} {values!r} "
            f"({error}); write a list, also of one"
        ) from error


def _count_logits(model: nn.Module, shape: Sequence[int], name: str) -> int:
    """Return K from one forward pass of two inputs, which leaves the network as it was."""
    like = next(model.parameters(), torch.zeros(()))
    inputs = torch.zeros(2, *shape, device=like.device, dtype=like.dtype)
    with evaluation_mode(model), torch.no_grad():
        try:
            return read_logits(model, {}, inputs).shape[1]
        except (ValueError, TypeError) as error:  # which say what was expected
            raise ValueError(f"{name}: {error}") from error
        except Exception as error:  # of code that is not ours
            raise ValueError(
                f"{name}: expected a network that reads inputs of shape {list(inputs.shape)}, got "
                f"{type(error).__name__}: {error}; mend it, or give the shape that it reads"
            ) from error


class _Chosen(nn.Module):
    """A network whose logits are one entry of what it returns."""

    def __init__(self, model: nn.Module, output: int | str | Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [n, K]."""
        returned = self.model(inputs)
        if callable(self.output):
            return self.output(returned)
        logits: Tensor = returned[self.output]
        return logits


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
    source: str | os.PathLike[str] | Callable[[], nn.Module] | nn.Module,
    *,
    weights: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | Mapping[Any, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    output: int | str | Callable[[Any], Tensor] | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Classifier:
    """Return a classifier from a file, from torchvision or from code of one's own.

    Parameters
    ----------
    source
        A file that `save_classifier` wrote, or a shipped one by name (``"digits-convnet"``);
        ``"torchvision:resnet50"`` for its default weights or
        ``"torchvision:ResNet50_Weights.IMAGENET1K_V2"`` for named ones, downloaded on first use
        and checked against torchvision's checksum; or ``"MODULE:CALLABLE"`` (of the working folder
        too, which stays importable), or the callable itself, which returns the network when it is
        called without arguments; or the network.
    weights
        A local state dict for it (.safetensors, or what `torch.save` wrote, read without pickled
        code) instead of a download.
    classes, mean, std, shape
        As in `Classifier`; needed for one's own network, and replace what is known of the others.
    output
        Which entry of what the network returns are the logits, by number or name, or a function of
        it; default: the output itself, its ``.logits`` or its ``"logits"``.
    root
        A folder in which shipped ones are looked for too.

    Raises ValueError for an unknown name or weights of another architecture, naming the first key
    that does not fit; FileNotFoundError for a missing file; RuntimeError for a failed download.
    """
    known: dict[str, Any]
    given: dict[str, Any] = {"classes": classes, "mean": mean, "std": std, "shape": shape}
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(source, nn.Module):
        model, known = source, {"name": type(source).__name__}
    elif callable(source):
        name = getattr(source, "__name__", "own")
        model, known = _called(source, name), {"name": name}
    elif str(source).startswith(TORCHVISION):
        model, known = _from_torchvision(str(source)[len(TORCHVISION) :], weights, given)
    elif ":" in str(source) and not Path(source).exists():
        model, known = _called(_from_code(str(source)), str(source)), {"name": str(source)}
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
    model, _ = unwrapped(model)
    if weights is not None:
        load_weights(model, weights)
    if output is not None:
        model = _Chosen(model, output)
    known |= given
    missing = [key for key in ("classes", "mean", "std", "shape") if key not in known]
    if missing:
        raise ValueError(
            f"{known['name']}: expected {', '.join(missing)} beside the network, got none; "
            f"say how its inputs are normalised and what its classes are called"
        )
    return Classifier(model.eval(), **known)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a local state dict into `model`; the model is not touched if it does not fit.

    Reads .safetensors, and files of `torch.save` with `weights_only=True`. A dict under a key of
    CONTAINERS is unwrapped, and what data-parallel training, torch.compile or Lightning put before
    the names is taken off. Counts of batches, which no result reads, may be missing.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one or one of another
    architecture: the message has the first key that does not fit.
    """
    own = model.state_dict()
    check_shaped(dict(model.named_parameters()))
    counts = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    state = counts | _without_prefix(_read_state(Path(path)), own.keys() - counts.keys())
    problems = [f"no {key!r}" for key in own if key not in state]
    problems += [f"{key!r}, which the network lacks" for key in state if key not in own]
    shapes = ((key, own[key].shape, state[key].shape) for key in own if key in state)
    wrong = [
        f"{list(got)} for {key!r}, expected {list(wanted)}"
        for key, wanted, got in shapes
        if wanted != got
    ]
    learned = dict(model.named_parameters())  # a mask among the buffers may well be −∞
    check_state({key: value for key, value in state.items() if key in learned}, Path(path))
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
    if what := foreign_content(path):
        raise ValueError(f"{path}: expected a file of weights, got {what}")
    if not path.stat().st_size:
        raise ValueError(f"{path}: expected a file of weights, got an empty one; fetch it again")
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
    while isinstance(state, Mapping):
        inner = next((k for k in CONTAINERS if isinstance(state.get(k), Mapping)), None)
        if inner is None:
            break
        state = state[inner]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path}: expected a state dict, names and tensors, got {type(state).__name__}; "
            f"save model.state_dict()"
        )
    return state


def _without_prefix(state: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """Return `state` under the network's own names, where only a wrapper's prefix is between.

    What stands beside the network (a Lightning module's loss) goes only if all of it is there.
    """
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while not wanted <= state.keys():
        for prefix in PREFIXES:
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if inner and (len(inner) == len(state) or wanted <= inner.keys()):
                state = inner
                break
        else:
            break
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
    if here not in sys.path:
        sys.path.insert(0, here)  # for good: the callable may import when it is called
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(
            f"{text}: expected MODULE:CALLABLE with a module that can be imported, got "
            f"{type(error).__name__}: {error}; import it by hand where the module lies"
        ) from error
    if not callable(getattr(found, name, None)):
        near = suggestion(name, [n for n in dir(found) if not n.startswith("_")])
        raise ValueError(f"{text}: expected a callable in {module}, got {name!r}{near}")
    return getattr(found, name)  # type: ignore[no-any-return]


def _called(source: Callable[[], Any], name: str) -> Any:
    try:
        return source()
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise ValueError(
            f"{name}: expected a callable that returns the network, got "
            f"{type(error).__name__}: {error}; call it by hand, without arguments"
        ) from error
