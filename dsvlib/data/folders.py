"""Folders of images as users have them: FOLDER/train/<class>/* and FOLDER/test/<class>/*.

Pixels become float32 in [0, 1], whatever the depth of the file; nothing is guessed: a file that
cannot be read as it was meant is named in an error.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

NO_IMAGES = {"thumbs.db", "desktop.ini", "__macosx"}  # what systems leave in folders
TEXTS = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yml", ".yaml", ".html", ".log", ".ini"}

TEST_PARTS = ("test", "val", "valid", "validation")  # the first that is there is the test part

Array = NDArray[Any]
Part = tuple[Tensor, Tensor]


class SeveralSizes(ValueError):
    """Images of several `sizes` where one is needed and no `image_size` was given."""

    def __init__(self, where: Path, sizes: list[tuple[int, ...]]) -> None:
        self.sizes = sizes
        super().__init__(
            f"{where}: expected images of one size, got {sizes[:3]}; pass image_size= to resize "
            f"them"
        )


def part_folder(folder: Path, part: str) -> Path:
    """Return the folder of ``"train"`` or ``"test"``, which may be called ``val`` too."""
    names = TEST_PARTS if part == "test" else (part,)
    return next((folder / name for name in names if (folder / name).is_dir()), folder / part)


def read_folder(folder: Path, image_size: int | None = None) -> tuple[Part, Part, tuple[str, ...]]:
    """Return images [n, C, H, W] and labels [n] of both parts, and the names of the classes.

    Hidden files and texts are left out, and images turned as their EXIF orientation says. C is 1
    where all images are grey, otherwise 3. Images of several sizes are resized where `image_size`
    is given.

    Raises FileNotFoundError for a missing part; ValueError for parts of other classes, a class
    without images, images of several sizes and files that are no images.
    """
    files: dict[str, list[tuple[Path, int]]] = {}
    names: list[str] = []
    for part in ("train", "test"):
        where = part_folder(folder, part)
        if not where.is_dir():
            raise FileNotFoundError(
                f"{where}: expected a folder of classes, found none; a folder data set "
                f"has {folder}/train/<class>/* and {folder}/test/<class>/*"
            )
        found = sorted(path.name for path in where.iterdir() if path.is_dir() and _counts(path))
        names = names or found
        if found != names or not found:
            raise ValueError(
                f"{where}: expected the classes {names} of the train folder, got {found}; "
                f"both need the same sub-folders"
            )
        files[part] = [
            (file, k) for k, name in enumerate(names) for file in images_of(where / name)
        ]
    arrays = {part: [_read(file) for file, _ in listed] for part, listed in files.items()}
    grey = all(array.ndim == 2 for part in arrays.values() for array in part)
    parts = []
    for part, listed in files.items():
        images = _stack(arrays[part], grey, image_size, part_folder(folder, part))
        parts.append((images, torch.tensor([label for _, label in listed])))
    return parts[0], parts[1], tuple(names)


def _counts(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name.lower() in NO_IMAGES
    return not hidden and path.suffix.lower() not in TEXTS


def images_of(folder: Path) -> list[Path]:
    """Return the image files of a class folder, sorted; raises ValueError for what is none."""
    files = sorted(path for path in folder.iterdir() if _counts(path))
    if not files:
        raise ValueError(
            f"{folder}: expected at least one image, got none; add some or remove the class from "
            f"every part"
        )
    for file in files:
        if not file.is_file():  # opening a named pipe would wait for ever
            kind = "a folder" if file.is_dir() else "something else than a file"
            raise ValueError(f"{file}: expected an image, got {kind}; move it elsewhere")
    return files


def _read(file: Path) -> Array:
    """Return pixels [H, W] or [H, W, 3]: uint8, or float32 in [0, 1] where the file has more."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                deep = _lost_depth(opened)
                opened.load()
                kind, image = opened.format, ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise ValueError(
            f"{file}: expected an image, got: {error}; remove or repair that file"
        ) from error
    if deep:
        raise ValueError(
            f"{file}: expected 8 bits for each colour, got 16, of which Pillow would drop half; "
            f"save it with 8, or as one grey channel"
        )
    if image.mode in ("L", "1", "LA", "La"):
        return np.asarray(image.convert("L"))
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode == "I" and (kind != "PNG" or not 0 <= pixels.min() <= pixels.max() < 2**16):
            raise ValueError(
                f"{file}: expected 8 or 16 bits for a pixel, got 32; save it with 16 at most"
            )
        return (pixels / np.float32(2**16 - 1)).astype(np.float32)
    if image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # a NaN fails it too
            raise ValueError(
                f"{file}: expected float pixels in [0, 1], got {pixels.min():g} to "
                f"{pixels.max():g}; divide them by their largest possible value"
            )
        return pixels
    return np.asarray(image.convert("RGB"))


def _lost_depth(image: Any) -> bool:
    """Whether an image that Pillow opened has more bits in its file than will be in its pixels."""
    if image.mode.startswith(("I", "F")):
        return False
    for codec, _, _, args in image.tile:  # how the file is coded, e.g. "RGB;16B"
        told = args if isinstance(args, tuple) else (args,)
        if any(isinstance(word, str) and ";16" in word for word in told):
            return True
        if codec.startswith("ppm") and isinstance(told[-1], int) and told[-1] > 255:
            return True  # the largest value
    return False


def _stack(arrays: list[Array], grey: bool, image_size: int | None, where: Path) -> Tensor:
    sizes = sorted({array.shape[:2] for array in arrays})
    if len(sizes) > 1 and image_size is None:
        raise SeveralSizes(where, sizes)
    height, width = sizes[0] if len(sizes) == 1 else (image_size, image_size)
    images = torch.empty(len(arrays), height or 0, width or 0, 1 if grey else 3)
    for index, array in enumerate(arrays):
        image = torch.from_numpy(np.atleast_3d(array).copy())
        image = image.float() / 255 if array.dtype == np.uint8 else image
        if image.shape[:2] != (height, width):
            image = F.interpolate(
                image.permute(2, 0, 1)[None], (height, width), mode="bilinear", antialias=True
            )[0].permute(1, 2, 0)
        images[index] = image
    return images.permute(0, 3, 1, 2)
