"""Downloads of data sets: which files, whether they are whole, and fetching what is missing.

Names, addresses and checksums are torchvision's. A download goes to ``<file>.part`` and is taken up
again where it broke off (HTTP Range); it takes its name only once its checksum is right. A folder
of images has no archive: its digest goes over the names and contents of its files.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvlib._errors import DsvError, RequestError, explain
from dsvlib._files import file_digest, repository_root

CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
}
FOLDERS = ("cifar10-jpeg", "imagenette-64")
BLOCK = 2**18


@dataclass(frozen=True)
class Archive:
    """One file of a data set: where it belongs below the root, whence it comes, its MD5."""

    path: str
    urls: tuple[str, ...]
    md5: str


def default_root() -> Path:
    """Return the folder where downloads live unless one says otherwise."""
    return repository_root() / "data" / "downloads"


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


def archives(name: str) -> list[Archive]:
    """Return the files of a data set that torchvision knows.

    Raises RequestError for any other name.
    """
    if name not in CLASSES:
        raise RequestError.unknown("data set to download", name, CLASSES)
    from torchvision import datasets

    known = getattr(datasets, CLASSES[name])
    if name.startswith("cifar"):
        return [Archive(known.filename, (known.url,), known.tgz_md5)]
    if name == "svhn":
        parts = [known.split_list[part] for part in ("train", "test")]
        return [Archive(file, (url,), md5) for url, file, md5 in parts]
    return [
        Archive(f"{known.__name__}/raw/{file}", tuple(m + file for m in known.mirrors), md5)
        for file, md5 in known.resources
    ]


def state(archive: Archive, root: Path) -> str:
    """Return ``whole``, ``missing``, ``broken off`` (a part is there) or ``damaged``."""
    path = root / archive.path
    if path.is_file():
        return "whole" if _md5(path) == archive.md5 else "damaged"
    return "broken off" if _part(path).is_file() else "missing"


def verify(name: str, root: Path) -> tuple[bool, str]:
    """Return whether a data set is whole below `root`, and a sentence about it.

    Raises RequestError for an unknown name.
    """
    if name == "digits":
        return True, "bundled with scikit-learn"
    if name in FOLDERS or name.startswith("folder:"):
        folder = Path(name.removeprefix("folder:")) if ":" in name else root / name
        if not (folder / "train").is_dir() or not (folder / "test").is_dir():
            return False, f"expected {folder}/train/<class>/* and {folder}/test/<class>/*"
        count, listing = folder_digest(folder)
        return True, f"{count} files, sha256 of the listing {listing}"
    if name not in CLASSES:
        known = ("digits", *CLASSES, *FOLDERS, "folder:PATH")
        raise RequestError.unknown("data set", name, known)
    states = {archive.path: state(archive, root) for archive in archives(name)}
    wrong = [f"{path} is {what}" for path, what in states.items() if what != "whole"]
    if not wrong:
        return True, f"{len(states)} files, MD5 as published"
    return False, f"{', '.join(wrong)}; run dsv data fetch {name} --root {root}"


def folder_digest(folder: Path) -> tuple[int, str]:
    """Return the number of files below `folder` and a SHA-256 over their names and contents."""
    listing, count = hashlib.sha256(), 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        listing.update(f"{name}\0{file_digest(path)}\n".encode())
        count += 1
    return count, listing.hexdigest()


def fetch(files: Sequence[Archive], root: Path, *, echo: Callable[[str], object] = print) -> None:
    """Bring every file that is not whole, going on where an earlier download broke off.

    Raises DsvError when no address answers or what came has another checksum.
    """
    for archive in files:
        found = state(archive, root)
        if found == "whole":
            echo(f"{archive.path} · already whole")
            continue
        path = root / archive.path
        with explain("write to", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            if found == "damaged":
                path.unlink()
        _fetch_one(archive, path, echo)


def _fetch_one(archive: Archive, path: Path, echo: Callable[[str], object]) -> None:
    part, reasons = _part(path), []
    for url in archive.urls:
        begun = part.stat().st_size if part.is_file() else 0
        echo(f"{archive.path} · {f'going on at byte {begun}' if begun else 'downloading'}")
        try:
            _download(url, part, begun)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # 416: the part was already as long as the file
                reasons.append(f"{url}: {error}")
                continue
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            reasons.append(f"{url}: {error}")
            continue
        except OSError as error:
            raise DsvError(
                f"cannot write {part}: {error.strerror or error}; free space or make it "
                f"writable, then run the command again: it goes on where it stopped"
            ) from error
        if _md5(part) == archive.md5:
            part.replace(path)
            echo(f"{archive.path} · whole")
            return
        part.unlink()  # going on from a wrong beginning would never end well
        reasons.append(f"{url}: another MD5 than {archive.md5}")
    kept = "; what came so far is kept" if part.is_file() else ""
    raise DsvError(
        f"{archive.path}: no download ({'; '.join(reasons)}){kept}; run it again, or offline copy "
        f"the file to {path}"
    )


def _download(url: str, part: Path, begun: int) -> None:
    """Append what is missing to `part`; start anew where the server knows no ranges."""
    headers = {"Range": f"bytes={begun}-"} if begun else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        going_on = begun and answer.status == 206
        length = answer.headers.get("Content-Length")
        got = 0
        with part.open("ab" if going_on else "wb") as out:
            while block := answer.read(BLOCK):
                out.write(block)
                got += len(block)
    if length is not None and got < int(length):
        raise http.client.IncompleteRead(b"", int(length) - got)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
