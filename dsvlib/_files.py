"""Files: where the repository is, and how a file is written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

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


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_safetensors(
    path: str | os.PathLike[str], expected: str, written_by: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read one of our safetensors files and check its format tag."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file that {written_by} wrote, found none")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file that {written_by} wrote, got a damaged or "
            f"foreign one ({error}); fetch or make it again"
        ) from error
    if metadata.get("format") != expected:
        raise ValueError(
            f"{path}: expected format {expected!r}, got {metadata.get('format')!r}; "
            f"only files that {written_by} wrote can be read here"
        )
    return tensors, metadata
