"""Errors that a user can put right: one sentence with what was expected, what came, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self


class DsvError(RuntimeError):
    """Something the user can put right; the message is one sentence with the fix."""

    exit_status = 1


class RequestError(DsvError):
    """What was asked for does not exist or does not fit: nothing has been started."""

    exit_status = 2

    @classmethod
    def unknown(cls, what: str, name: str, options: Iterable[str]) -> Self:
        """Return the error for a name that is none of `options`, with the nearest of them."""
        known = sorted(options)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
        return cls(f"unknown {what} {name!r}; {hint}")


@contextmanager
def explain(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError (full disk, read-only folder) into one sentence about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "free space or make it writable"
        raise DsvError(f"cannot {action} {path}: {reason}; {fix}") from error
