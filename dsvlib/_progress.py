"""One way to show progress: a live bar on a terminal, a rare line everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress_bar(iterable: Iterable[T], description: str) -> Iterable[T]:
    """Yield from `iterable`, showing a bar if it takes more than a few seconds.

    Where nobody watches (papermill, CI, a pipe) at most one line appears per ten seconds.
    """
    from tqdm import tqdm  # imported late: `import dsvlib` stays quick

    watched = sys.stderr.isatty()
    bar: Iterable[T] = tqdm(
        iterable,
        desc=description,
        leave=False,
        delay=2,
        mininterval=0.2 if watched else 10,
        file=sys.stderr,
    )
    return bar


def duration(seconds: float) -> str:
    """Return a time as people say it, such as ``2 min 5 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0)
    return " ".join(parts + [f"{rest} s"] * (rest > 0 or not parts))
