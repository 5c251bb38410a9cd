"""Which data sets a notebook's parameters name, and whether this machine has what a run needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsvlib._errors import RequestError
from dsvlib.data.downloads import CLASSES, FOLDERS, archives, fetch, part_folder, state


def data_sets(parameters: Mapping[str, Any]) -> list[str]:
    """Return the data sets that a notebook's parameters name, also those inside of lists."""
    found: dict[str, None] = {}
    todo = [value for key, value in parameters.items() if key != "preset"]  # one is called cifar10
    while todo:
        value = todo.pop(0)
        if isinstance(value, list):
            todo += value
        elif isinstance(value, str) and (
            value in ("digits", *CLASSES, *FOLDERS) or value.startswith("folder:")
        ):
            found[value] = None
    return list(found)


def check_needs(parameters: Iterable[Mapping[str, Any]], device: str | None, root: Path) -> None:
    """Refuse at once what would fail in every notebook, and bring the data that can be brought.

    Raises RequestError for a device that this machine lacks or a folder of images that is missing,
    DsvError for a download that fails.
    """
    if device not in (None, "auto", "cpu"):
        import torch

        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
            raise RequestError(
                f"--device: expected one that this machine has, got {device!r} "
                f"({str(error).splitlines()[0]}); leave it out, or pass cpu"
            ) from error
    needed = dict.fromkeys(name for each in parameters for name in data_sets(each))
    for name in (n for n in needed if n in FOLDERS or n.startswith("folder:")):
        folder = Path(name.removeprefix("folder:")) if ":" in name else root / name
        if not (part_folder(folder, "train").is_dir() or part_folder(root, "train").is_dir()):
            raise RequestError(
                f"--data-root: expected the images of {name} as {folder}/train/<class>/* and "
                f"test/<class>/*, found none; name the folder that holds {folder.name}"
            )
    for name in (n for n in needed if n in CLASSES):
        missing = [archive for archive in archives(name) if state(archive, root) != "whole"]
        if missing and not _unpacked(name, root):
            fetch(missing, root)


def _unpacked(name: str, root: Path) -> bool:
    """Whether torchvision finds a data set in `root` without its archives."""
    from torchvision import datasets

    try:
        getattr(datasets, CLASSES[name])(str(root), download=False)
    except (RuntimeError, OSError):
        return False
    return True
