"""Keeping freed memory, so that large tensors are not handed back and asked for at every step.

glibc maps a block above 32 MB anew for each tensor and returns it when the tensor dies; the kernel
then clears it page by page. On a CPU that is a third of a training step of the field's ConvNet.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

# mallopt's numbers (malloc.h) and what child processes read instead, with the values for both:
# no block is mapped by itself, and the heap is trimmed only beyond what any machine has free
_SETTINGS = {
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
}


def keep_memory(library: Any = None) -> bool:
    """Make this process and its children keep the memory that they free, and say whether it took.

    Only glibc (Linux) has these settings; elsewhere nothing changes. Settings that the user has
    made in the environment win. The price is that memory stays at its peak until the process ends.
    `library` is the C library to ask, by default this process's own.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = getattr(library or ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    os.environ |= {name: str(value) for name, (_, value) in _SETTINGS.items()}
    answers = [mallopt(number, value) for number, value in _SETTINGS.values()]
    return answers == [1] * len(answers)
