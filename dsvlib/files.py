"""Files: where the repository is, and how a file is written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def repository_root() -> Path:
    """Return the checkout that holds this package, whatever the working directory is."""
    return PACKAGE.parent


def checkpoints_folder() -> Path:
    """Return the folder of the shipped classifiers: the checkout's, or the wheel's own copy."""
    packaged = PACKAGE / "_checkpoints"
    return packaged if packaged.is_dir() else repository_root() / "data" / "checkpoints"


opened_checkpoints: set[str] = set()  # what this process has read, so that a run can name it


def checkpoint_path(name: str) -> Path:
    """Return where a shipped classifier lies, or would lie."""
    return checkpoints_folder() / f"{name}.safetensors"


def shipped_checkpoint(name: str) -> Path:
    """Return the file of a shipped classifier, and remember that this process asked for it."""
    path = checkpoint_path(name)
    if path.is_file():
        opened_checkpoints.add(name)
    return path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it takes `path`'s place only on success.

    A reader sees the old file or the new one, never half of either, also after `kill -9`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes private files; what we publish has the permissions of any new file
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
