"""Which data sets a notebook's parameters name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsvlib.data.downloads import CLASSES, FOLDERS


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
