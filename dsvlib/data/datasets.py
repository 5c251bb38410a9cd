"""Data sets as two tensors each, normalised: x = (pixel − mean) / std, pixel ∈ [0, 1].

Everything small enough to fit in memory is kept there; no loader processes, no hidden state.
Shapes: inputs float32 [n, C, H, W], labels int64 [n].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsvlib._files import downloads_folder
from dsvlib._validation import as_labels, check_same_length, labels_to, suggestion
from dsvlib.data.folders import SeveralSizes, read_folder
from dsvlib.support_set import Normalised, SupportSet

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
DIGITS = tuple("0123456789")
# Channel statistics that the field normalises with; other data sets use their own training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
# What CIFAR itself is known by: classes, images of each in the two parts, mean of each channel of
# the training pixels in [0, 1].
KNOWN_CIFAR = {
    "cifar10": (10, (5000, 1000), (0.49139968, 0.48215841, 0.44653091)),
    "cifar100": (100, (500, 100), (0.50707516, 0.48654887, 0.44091784)),
}


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: `inputs` [n, C, H, W] and `labels` [n].

    `mean` and `std` are how the inputs were normalised, where that is known.
    """

    inputs: Tensor
    labels: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_same_length(inputs=len(self.inputs), labels=len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Split:
        return replace(self, inputs=self.inputs[index], labels=self.labels[index])

    def to(self, device: torch.device | str | torch.dtype) -> Split:
        """Return the same samples on `device`, or in that dtype (class numbers stay int64)."""
        return replace(self, inputs=self.inputs.to(device), labels=labels_to(self.labels, device))


Labelled = Split | SupportSet  # what can be trained on or tested on
# A part of a data set as users have it: ours, or any torch Dataset or DataLoader of (image, label).
AnySplit = Labelled | torch.utils.data.Dataset[Any] | Iterable[Any]


def as_split(data: AnySplit) -> Labelled:
    """Return a part of a data set as tensors in memory.

    `data` is a `Split` or `SupportSet`, which is returned as it is; a torch Dataset or any sequence
    of (image, label); a DataLoader, read once through; or a pair of tensors, inputs and labels. An
    image is a normalised float tensor [C, H, W], a label a class number or a row of probabilities.

    Raises TypeError for anything else, ValueError for images of several shapes.
    """
    if isinstance(data, Dataset):
        raise TypeError("expected one part of a data set, got both; pass data.train or data.test")
    if hasattr(data, "inputs") and hasattr(data, "labels"):
        return cast(Labelled, data)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        return Split(data[0], as_labels(data[1]))
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, str | bytes | Mapping | Set | Tensor) or not (
        indexed or isinstance(data, Iterable)
    ):
        raise TypeError(
            f"expected a Split, or a Dataset or DataLoader of (image, label), got "
            f"{type(data).__name__}; e.g. Split(inputs, labels)"
        )
    batched = isinstance(data, torch.utils.data.DataLoader)
    found: Any = data  # a Dataset need not end by itself
    items = (found[i] for i in range(len(found))) if indexed else iter(found)
    pairs = [_pair(item, number, batched) for number, item in enumerate(items)]
    if not pairs:
        raise ValueError("expected at least one sample, got none; add some")
    shapes = sorted({tuple(image.shape[batched:]) for image, _ in pairs})
    if len(shapes) > 1:
        raise ValueError(f"expected images of one shape, got {shapes[:3]}; resize them first")
    join = torch.cat if batched else torch.stack
    try:
        labels = join([torch.as_tensor(label) for _, label in pairs])
    except (TypeError, ValueError, RuntimeError):  # names, for which this has words:
        labels = as_labels([label for _, label in pairs])
    return Split(join([image for image, _ in pairs]), as_labels(labels))


def _pair(item: Any, number: int, batched: bool) -> tuple[Tensor, Any]:
    what = "batch" if batched else "item"
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise TypeError(
            f"{what} {number}: expected (image, label), got {type(item).__name__} "
            f"{str(item)[:60]}; wrap the data set so that it gives pairs"
        )
    image, label = item
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{what} {number}: expected the image as a float tensor [C, H, W], got "
            f"{type(image).__name__}; pass transform=torchvision.transforms.ToTensor()"
        )
    return image, label


@dataclass(frozen=True, eq=False)
class Dataset(Normalised):
    """Training and test images with everything that is needed to read them.

    `mean` and `std` hold one number per channel, for pixels in [0, 1].
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    test: Split

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        channels, height, width = self.train.inputs.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every pixel and label: which data a number came from."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(split.inputs.numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        return digest.hexdigest()


class _Pixels(NamedTuple):
    """Raw images before normalisation: float [n, C, H, W] in [0, 1] and labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]


Reader = Callable[[Path, int | None], _Pixels]  # of a root and the size for images of several


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    limit: int | None = None,
) -> Dataset:
    """Load a data set into memory.

    Parameters
    ----------
    name
        ``"digits"`` (comes with scikit-learn, works offline; 8×8 up-sampled to 16×16; a fixed
        stratified split into 1,347 training and 450 test images), ``"cifar10"``, ``"cifar100"``
        (folders ``root/NAME/{train,test}/<class>/*`` or torchvision's files, downloaded on demand;
        the same images in the same order from both, and refused where they are others),
        ``"svhn"``, ``"mnist"``, ``"fashion_mnist"`` (torchvision's), ``"imagenette-64"`` (folders
        below `root`), or ``"folder:PATH"`` with ``PATH/train/<class>/*`` and
        ``PATH/test/<class>/*`` (or ``val``; `folders` says how files are read).
    root
        Where downloads live (default: ``data/downloads`` in a checkout, else the cache).
    image_size
        Height and width to resize to; what folders with images of several sizes need.
    limit
        Keep at most this many images of each split, the first of every class in turn.

    Raises ValueError for an unknown name or a setting out of range, FileNotFoundError for a
    missing folder, RuntimeError when a download fails.
    """
    for setting, value in (("image_size", image_size), ("limit", limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{setting}: expected a whole number ≥ 1 or None, got {value!r}")
    folder = Path(root) if root else downloads_folder()
    statistics = STATISTICS.get(name)
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:"))
        pixels, name = _Pixels(*read_folder(path, image_size)), path.resolve().name
    elif name in _READERS:
        pixels = _READERS[name](folder, image_size)
    else:
        options = [*_READERS, "folder:PATH"]
        raise ValueError(
            f"name: expected one of {', '.join(options)}, got {name!r}{suggestion(name, options)}"
        )
    train, test = (_prepare(*part, image_size, limit) for part in (pixels.train, pixels.test))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{name}: expected training and test images of one shape, got "
            f"{list(train[0].shape[1:])} and {list(test[0].shape[1:])}; pass image_size="
        )
    if statistics is not None:
        mean, std = statistics
    else:
        mean = tuple(train[0].mean(dim=(0, 2, 3)).tolist())
        std = tuple(train[0].std(dim=(0, 2, 3)).clamp(min=1e-3).tolist())
    offset, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    splits = [
        Split((images - offset) / scale, labels, mean, std) for images, labels in (train, test)
    ]
    return Dataset(name, pixels.classes, mean, std, *splits)


def first_of_each(labels: Tensor, limit: int) -> Tensor:
    """Return the places of at most `limit` samples, the first of every class in turn."""
    one_hot = F.one_hot(labels)
    rank = (one_hot.cumsum(0) * one_hot).sum(1)  # of each sample within its class
    return torch.sort(rank, stable=True).indices[:limit].sort().values


def _prepare(
    images: Tensor, labels: Tensor, image_size: int | None, limit: int | None
) -> tuple[Tensor, Tensor]:
    if limit is not None and limit < len(labels):
        keep = first_of_each(labels, limit)
        images, labels = images[keep], labels[keep]
    if image_size is not None and images.shape[-2:] != (image_size, image_size):
        images = F.interpolate(
            images, size=(image_size, image_size), mode="bilinear", antialias=True
        )
    return images, labels


def _read_digits(_: Path, __: int | None) -> _Pixels:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=450, stratify=labels, random_state=0
    )
    return _Pixels((images[train], labels[train]), (images[test], labels[test]), DIGITS)


def _read_torchvision(
    name: str, train: dict[str, object], test: dict[str, object], classes: tuple[str, ...] = ()
) -> Reader:
    """Return a reader for torchvision's class `name`; it downloads once and verifies checksums."""

    def read_part(folder: Path, options: dict[str, object]) -> tuple[Tensor, Tensor, Any]:
        from torchvision import datasets

        try:
            data = getattr(datasets, name)(str(folder), download=True, **options)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"{name}: expected the data set in {folder} or a download, got: {error}; "
                f"go online once, or copy torchvision's files there and pass root="
            ) from error
        images = torch.as_tensor(data.data)
        if images.ndim == 3:  # grey images without a channel
            images = images.unsqueeze(1)
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        labels = torch.as_tensor(getattr(data, "targets", getattr(data, "labels", None)))
        return images.float() / 255, labels.to(torch.int64), data

    def read(folder: Path, _: int | None) -> _Pixels:
        train_images, train_labels, data = read_part(folder, train)
        test_images, test_labels, _ = read_part(folder, test)
        names = classes or tuple(data.classes)
        return _Pixels((train_images, train_labels), (test_images, test_labels), names)

    return read


def _read_cifar(name: str, from_torchvision: Reader) -> Reader:
    """Return a reader for folders below the root, where they are, or torchvision's files.

    The two keep the images in different orders; here they stand in that of the SHA-256 of their
    pixels, so that a seed means the same batches wherever the images came from.
    """

    def read(folder: Path, _: int | None) -> _Pixels:
        if (folder / name).is_dir():
            pixels = cifar_from_folder(name, folder / name)
        else:
            pixels = from_torchvision(folder, None)
            _check_cifar(name, pixels, folder)
        return pixels._replace(train=_in_order(*pixels.train), test=_in_order(*pixels.test))

    return read


def cifar_from_folder(name: str, folder: Path) -> _Pixels:
    """Return the images of ``folder/{train,test}/<class>/*``, which have to be those of `name`.

    Raises FileNotFoundError for a missing part, ValueError for other images.
    """
    try:
        pixels = _Pixels(*read_folder(folder))
    except SeveralSizes as error:
        raise _not_itself(name, folder, "images 3×32×32", f"sizes {error.sizes[:3]}") from error
    _check_cifar(name, pixels, folder)
    return pixels


def _check_cifar(name: str, pixels: _Pixels, where: Path) -> None:
    """Raise ValueError where the images are not those of the data set that they are called by."""
    number, each, means = KNOWN_CIFAR[name]
    names = pixels.classes
    if len(names) != number:
        raise _not_itself(name, where, f"{number} classes", f"{len(names)}: {_short(names)}")
    if name == "cifar10" and names != CIFAR10_CLASSES:  # their order is what labels mean
        unknown = sorted(set(names) - set(CIFAR10_CLASSES))
        raise _not_itself(name, where, f"classes called {_short(CIFAR10_CLASSES)}", _short(unknown))
    for part, (images, labels), expected in zip(("train", "test"), pixels[:2], each, strict=True):
        if tuple(images.shape[1:]) != (3, 32, 32):
            size = "×".join(map(str, images.shape[1:]))
            raise _not_itself(name, where, f"{part} images 3×32×32", size)
        counts = zip(names, labels.bincount(minlength=number).tolist(), strict=True)
        wrong = [f"{count} of {label}" for label, count in counts if count != expected]
        if wrong:
            what = f"{expected} {part} images of each class"
            raise _not_itself(name, where, what, _short(wrong))
    train = pixels.train[0]
    total = sum(part.double().sum(dim=(0, 2, 3)) for part in train.split(5000))
    got = [round(value / train[:, 0].numel(), 8) for value in total.tolist()]
    # noise of three grey levels would move a mean by 1e-6; rounding moves it by 1e-8
    if any(abs(a - b) > 1e-7 for a, b in zip(got, means, strict=True)):
        raise _not_itself(
            name, where, f"training pixels with channel means {means}", f"{tuple(got)}, as after "
            f"resizing or lossy compression",
        )  # fmt: skip


def _not_itself(name: str, where: Path, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{where}: expected {name} itself, {expected}, got {got}; put all of its images there, "
        f"lossless, or rename the folder and load it as folder:PATH"
    )


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _in_order(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    raw = (images * 255).round().to(torch.uint8).contiguous().numpy()
    keys = [hashlib.sha256(image.tobytes()).digest() for image in raw]
    # the same image under two labels keeps one order, too
    order = torch.tensor(sorted(range(len(keys)), key=lambda i: (keys[i], int(labels[i]))))
    return images[order], labels[order]


def _read_below(name: str) -> Reader:
    """Return a reader for the folders of images in ``root/<name>``, or in `root` itself."""

    def read(folder: Path, image_size: int | None) -> _Pixels:
        below = folder / name
        return _Pixels(*read_folder(below if below.is_dir() else folder, image_size))

    return read


_BY_FLAG: tuple[dict[str, object], dict[str, object]] = ({"train": True}, {"train": False})
_READERS: dict[str, Reader] = {
    "digits": _read_digits,
    "cifar10": _read_cifar(
        "cifar10", _read_torchvision("CIFAR10", *_BY_FLAG, classes=CIFAR10_CLASSES)
    ),
    "cifar100": _read_cifar("cifar100", _read_torchvision("CIFAR100", *_BY_FLAG)),
    "svhn": _read_torchvision("SVHN", {"split": "train"}, {"split": "test"}, classes=DIGITS),
    "mnist": _read_torchvision("MNIST", *_BY_FLAG, classes=DIGITS),
    "fashion_mnist": _read_torchvision("FashionMNIST", *_BY_FLAG),
    "imagenette-64": _read_below("imagenette-64"),
}
