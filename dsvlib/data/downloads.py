"""Downloads of data sets: which files, whether they are whole, and fetching what is missing.

Names, addresses, checksums and the download itself are torchvision's. A folder of images has no
archive: its digest goes over the names and contents of its files, and one that is called CIFAR is
held against what CIFAR is known by.
"""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from dsvlib._errors import DsvError, RequestError, explain
from dsvlib._files import atomic_path, file_digest

CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
}
FOLDERS = ("imagenette-64",)
KNOWN = ("digits", *CLASSES, *FOLDERS)
CIFAR = ("cifar10", "cifar100")  # downloaded, or folders of images as well


@dataclass(frozen=True)
class Archive:
    """One file of a data set: where it belongs below the root, whence it comes, its MD5."""

    path: str
    urls: tuple[str, ...]
    md5: str


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


def unpacked(name: str) -> list[Archive]:
    """Return the files that torchvision reads CIFAR from, once its archive was unpacked."""
    from torchvision import datasets

    known = getattr(datasets, CLASSES[name])
    files = [*known.train_list, *known.test_list, (known.meta["filename"], known.meta["md5"])]
    return [Archive(f"{known.base_folder}/{file}", (), md5) for file, md5 in files]


def as_folder(name: str, root: Path) -> bool:
    """Return whether `load_dataset` reads folders of images, and not what torchvision brings."""
    return name in FOLDERS or (name in CIFAR and (root / name).is_dir())


def has_images(folder: Path) -> bool:
    """Return whether a folder has at least something where training images belong."""
    return any(folder.glob("train/*/*"))


def present(name: str, root: Path) -> bool:
    """Return whether a data set lies below `root`, by its names alone; `verify` looks inside."""
    if as_folder(name, root):
        return has_images(root / name)
    forms = [archives(name), *([unpacked(name)] if name in CIFAR else [])]
    return any(all((root / file.path).is_file() for file in form) for form in forms)


def reachable(name: str, *, timeout_s: float = 10) -> bool:
    """Return whether one address at least of every file of a data set answers."""
    return all(any(_answers(url, timeout_s) for url in file.urls) for file in archives(name))


def _answers(url: str, timeout_s: float) -> bool:
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "dsvlib"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:  # some servers do not answer HEAD, but answer
        return error.code not in (404, 410)
    except (OSError, HTTPException):
        return False


def state(archive: Archive, root: Path) -> str:
    """Return ``whole``, ``missing`` or ``damaged``."""
    from torchvision.datasets.utils import check_integrity

    path = root / archive.path
    if not path.is_file():
        return "missing"
    return "whole" if check_integrity(path, archive.md5) else "damaged"


def states(name: str, root: Path) -> dict[str, str]:
    """Return the state of every file: of what was unpacked, where that is whole, or of archives."""
    if name in CIFAR:
        found = {file.path: state(file, root) for file in unpacked(name)}
        if set(found.values()) == {"whole"}:
            return found
    return {file.path: state(file, root) for file in archives(name)}


def verify(name: str, root: Path) -> tuple[bool, str]:
    """Return whether a data set is whole below `root`, and a sentence about it.

    Raises RequestError for an unknown name.
    """
    if name == "digits":
        return True, "bundled with scikit-learn"
    if name in CIFAR and as_folder(name, root):
        return _verify_cifar(name, root / name)
    if name in FOLDERS or name.startswith("folder:"):
        from dsvlib.data.folders import part_folder

        folder = Path(name.removeprefix("folder:")) if ":" in name else root / name
        if not all(part_folder(folder, part).is_dir() for part in ("train", "test")):
            return False, f"expected {folder}/train/<class>/* and {folder}/test/<class>/*"
        count, listing = folder_digest(folder)
        return True, f"{count} files, sha256 of the listing {listing}"
    if name not in CLASSES:
        raise RequestError.unknown("data set", name, (*KNOWN, "folder:PATH"))
    found = states(name, root)
    wrong = [f"{path} is {what}" for path, what in found.items() if what != "whole"]
    if not wrong:
        return True, f"{len(found)} files, MD5 as published"
    return False, f"{', '.join(wrong)}; run dsv data fetch {name} --root {root}"


def _verify_cifar(name: str, folder: Path) -> tuple[bool, str]:
    """Look at every image: there are no published checksums of single files."""
    from dsvlib.data.datasets import cifar_from_folder

    try:
        train, test, classes = cifar_from_folder(name, folder)
    except (OSError, ValueError) as error:
        return False, str(error)
    count = len(train[1]) + len(test[1])
    return True, f"{count} images of {len(classes)} classes, channel means as published"


def folder_digest(folder: Path) -> tuple[int, str]:
    """Return the number of files below `folder` and a SHA-256 over their names and contents."""
    listing, count = hashlib.sha256(), 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        listing.update(f"{name}\0{file_digest(path)}\n".encode())
        count += 1
    return count, listing.hexdigest()


def fetch(files: Sequence[Archive], root: Path, *, echo: Callable[[str], object] = print) -> None:
    """Bring every file that is not whole; each takes its name once its checksum is right.

    Raises DsvError when no address answers or what came has another checksum.
    """
    from torchvision.datasets.utils import download_url

    for archive in files:
        path, reasons = root / archive.path, []
        if state(archive, root) == "whole":
            echo(f"{archive.path} · already whole")
            continue
        for url in archive.urls:
            echo(f"{archive.path} · downloading")
            try:
                with explain("write", path), atomic_path(path) as new:
                    try:
                        download_url(url, str(new.parent), new.name, archive.md5)
                    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                        raise HTTPException(error) from error  # of the network, not of the disk
            except HTTPException as error:
                reasons.append(f"{url}: {error}")
            except RuntimeError as error:
                if isinstance(error, DsvError):
                    raise
                reasons.append(f"{url}: another MD5 than {archive.md5}")
            else:
                echo(f"{archive.path} · whole")
                break
        else:
            raise DsvError(
                f"{archive.path}: no download ({'; '.join(reasons)}); run it again, or offline "
                f"copy the file to {path}"
            )
