"""Files: where things are found and put, and how a file is written whole or not at all."""

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


def checkout() -> Path | None:
    """Return the checkout that holds this package; None where a wheel was installed."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() else None


def repository_root() -> Path:
    """Return the checkout that holds this package, whatever the working directory is."""
    root = checkout()
    if root is None:
        raise FileNotFoundError("expected a checkout of the repository; clone it, run this there")
    return root


def data_folder() -> Path:
    """Return where data are kept: a checkout's ``data``, or else the user's cache.

    The environment's DSV_CACHE names another cache. Nothing is written beside the package.
    """
    root = checkout()
    if root is not None:
        return root / "data"
    import platformdirs

    return Path(os.environ.get("DSV_CACHE") or platformdirs.user_cache_dir("dsvlib"))


def downloads_folder() -> Path:
    """Return where downloads live unless one says otherwise."""
    return data_folder() / "downloads"


def checkpoints_folder() -> Path:
    """Return where trained classifiers are put, and looked for after those of a wheel."""
    return data_folder() / "checkpoints"


def checkpoint_path(name: str, root: Path | None = None) -> Path:
    """Return where a shipped classifier lies, or would lie: the wheel's, the data's, or `root`."""
    known = [PACKAGE / "_checkpoints", checkpoints_folder(), *([] if root is None else [root])]
    paths = [folder / f"{name}.safetensors" for folder in known]
    return next((path for path in paths if path.is_file()), checkpoints_folder() / paths[0].name)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it takes `path`'s place only on success.

    A reader sees the old file or the new one, never half of either, also after `kill -9`.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target}: expected a file, got a folder; name a file in it")
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


def foreign_content(path: Path) -> str | None:
    """Return what a file holds that is often found in place of weights, with the fix, or None."""
    with path.open("rb") as stream:
        start = stream.read(100).lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; run git lfs pull where it was cloned"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page; download the file itself (its raw link)"
    return None


def read_safetensors(
    path: str | os.PathLike[str], expected: str, written_by: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read one of our safetensors files and check its format tag."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file that {written_by} wrote, found none")
    if what := foreign_content(Path(path)):
        raise ValueError(f"{path}: expected a file that {written_by} wrote, got {what}")
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
