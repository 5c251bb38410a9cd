"""What notebooks need of a machine: the data sets that their parameters name, and a device."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsvlib._errors import RequestError
from dsvlib._files import downloads_folder
from dsvlib.data.downloads import (
    CIFAR,
    CLASSES,
    FOLDERS,
    KNOWN,
    as_folder,
    has_images,
    present,
    reachable,
)

if TYPE_CHECKING:
    from companion.presets import Job


def data_sets(parameters: Mapping[str, Any]) -> list[str]:
    """Return the data sets that a notebook's parameters name, also those inside of lists."""
    found: dict[str, None] = {}
    todo = [value for key, value in parameters.items() if key != "preset"]  # one is called cifar10
    while todo:
        value = todo.pop(0)
        if isinstance(value, list):
            todo += value
        elif isinstance(value, str) and (value in KNOWN or value.startswith("folder:")):
            found[value] = None
    return list(found)


def data_needed(jobs: Sequence[Job], data_root: Path | None) -> dict[str, str]:
    """Return, for every data set that the jobs' parameters name, ``present`` or how to bring it."""
    needed = {}
    root = data_root or downloads_folder()
    for name in dict.fromkeys(name for job in jobs for name in data_sets(job.parameters)):
        if name == "digits":
            needed[name] = "present (bundled)"
            continue
        folder = Path(name.removeprefix("folder:")) if ":" in name else root / name
        if name.startswith("folder:"):
            there = has_images(folder)
            fix = f"expected {folder}/train/<class>/* and {folder}/test/<class>/*"
        elif name in FOLDERS or (as_folder(name, root) and not present(name, root)):
            there = has_images(folder)
            fix = f"copy train/<class>/* and test/<class>/* to {folder}"
            fix += ", or name its folder with --data-root"
        else:
            there, fix = present(name, root), f"dsv data fetch {name} --root {root}"
        needed[name] = "present" if there else f"missing: {fix}"
    return needed


def check_device(device: str | None) -> str | None:
    """Return the device; raise RequestError for one that is not here."""
    if device in (None, "auto", "cpu"):
        return device
    known = re.fullmatch(r"cuda(?::(\d{1,3}))?", str(device))
    if known is None:
        raise RequestError(f"--device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    import torch

    count = torch.cuda.device_count()
    if int(known[1] or 0) >= count:
        raise RequestError(
            f"--device: expected auto or cpu, since torch sees {count} GPUs here, got {device!r}"
        )
    return device


def check_machine(jobs: Sequence[Job]) -> None:
    """Raise RequestError, before any notebook starts, for a device or images that are not here.

    Data sets whose published address answers are downloaded when they are first read.
    """
    for job in jobs:
        check_device(job.parameters["device"])
    answers = cache(reachable)  # a silent network is waited for once
    for job in jobs:
        where = Path(job.parameters["data_root"] or downloads_folder())
        for name, state in data_needed([job], where).items():
            if not state.startswith("missing"):
                continue
            if name not in CLASSES or as_folder(name, where):
                raise RequestError(f"{job.name} needs the images of {name}; {state}")
            if not answers(name):
                what = "train/<class>/* and test/<class>/*" if name in CIFAR else "its files"
                target = where / name if name in CIFAR else where
                raise RequestError(
                    f"{job.name} needs the images of {name}; {state}, but its address does not "
                    f"answer; copy {what} to {target}, or "
                    f"name where they are with --data-root"
                )
