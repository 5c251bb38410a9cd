"""Do people read the pictures? A fixed set of them without labels, its key apart, and a score.

A run publishes a set as three files (`Run.save_blind_test`): ``<name>.png``, all pictures as equal
tiles, row by row in a drawn order, which is that of their numbers; ``<name>.csv``, the key, with
what each picture was made of, asked to show, and read as by a judge; and the run's sidecar, with
the digests of both and how they were made. The picture tells nothing of its key.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dsvlib._errors import DsvError, RequestError
from dsvlib._files import atomic_path, file_digest

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

NAME = "blind_test"  # of the set that the site shows
KINDS = ("support vector", "control", "real")
COLUMNS = 10  # tiles in a row
UNSURE = "?"  # the answer of who cannot tell; it counts as not read


@dataclass(frozen=True)
class Group:
    """Pictures of one of KINDS: images [n, C, H, W] in [0, 1], and a class's name for each.

    `asked` is what a picture was made to show (or shows, if real), `judged` what an independent
    judge reads; `source` says in a few words where they come from, such as the recipe.
    """

    kind: str
    images: np.ndarray
    asked: Sequence[str]
    judged: Sequence[str]
    source: str


@dataclass(frozen=True)
class BlindTest:
    """A set: the file of its pictures, and a key with the columns of `make`, number by number."""

    png: bytes = field(repr=False)
    key: pd.DataFrame

    @property
    def digest(self) -> str:
        """The SHA-256 of the pictures' file, by which answers name their set."""
        return hashlib.sha256(self.png).hexdigest()

    @property
    def classes(self) -> list[str]:
        """The answers to choose from: every class that is asked for, in alphabetical order."""
        return sorted(set(self.key["asked"]))

    @property
    def pictures(self) -> np.ndarray:
        """The pictures as they are shown, levels [n, H, W, 3] from 0 to 255."""
        import numpy as np
        from PIL import Image

        with Image.open(io.BytesIO(self.png)) as opened:
            sheet = np.asarray(opened.convert("RGB"))
        rows, n = -(-len(self.key) // COLUMNS), len(self.key)
        height, width = sheet.shape[0] // rows, sheet.shape[1] // COLUMNS
        tiles = sheet.reshape(rows, height, COLUMNS, width, 3).transpose(0, 2, 1, 3, 4)
        return tiles.reshape(-1, height, width, 3)[:n]

    def save(self, stem: Path) -> list[Path]:
        """Write ``<stem>.png`` and ``<stem>.csv``; return their paths."""
        picture, key = (stem.with_name(stem.name + suffix) for suffix in (".png", ".csv"))
        with atomic_path(picture) as temporary:
            temporary.write_bytes(self.png)
        with atomic_path(key) as temporary:
            self.key.to_csv(temporary, index=False, lineterminator="\n")
        return [picture, key]

    @classmethod
    def load(cls, folder: Path | str, name: str = NAME) -> Self:
        """Return the set that a run has published in `folder`.

        Raises DsvError where it is missing, or no longer what the run made.
        """
        import pandas as pd

        folder = Path(folder)
        try:
            named = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["files"]
            for file in (f"{name}.png", f"{name}.csv"):
                if (own := file_digest(folder / file)) != named[file]:
                    raise DsvError(
                        f"{folder.name}/{file}: expected the file of SHA-256 {named[file][:12]}…, "
                        f"got {own[:12]}…, so that pictures and key may no longer fit; restore it "
                        f"(git checkout) or run the notebook again"
                    )
            key = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
            key["number"] = key["number"].astype(int)
            return cls((folder / f"{name}.png").read_bytes(), key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DsvError(
                f"{folder}: expected a blind test, {name}.png, .csv and .json, got {error}; run "
                f"the notebook that makes it"
            ) from error

    def ask(self, count: int | None = None, *, tile: float = 0.9) -> Figure:
        """Draw the first `count` pictures (default: all) with their numbers and nothing else."""
        import numpy as np
        from PIL import Image

        from companion.figures import image_grid

        shown = self.pictures[:count]
        # enlarged smoothly: the edges of large pixels hide what a small picture shows
        size = (4 * shown.shape[2], 4 * shown.shape[1])
        large = [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in shown]
        images = np.stack([np.asarray(p) for p in large]).transpose(0, 3, 1, 2) / 255
        numbers = [str(number) for number in self.key["number"][: len(shown)]]
        return image_grid(images, captions=numbers, columns=min(5, len(shown)), tile=tile)

    def score(self, answers: Sequence[str] | Mapping[int, str] = ()) -> pd.DataFrame:
        """Return how many pictures of each kind were read as asked, beside the judge.

        `answers` are names of classes, UNSURE (which counts as not read) or "" (not answered), in
        the order of the numbers, or by number. Columns, rates in %: n, right, accuracy, low and
        high (Wilson's 95 % interval), and judge, on the same pictures; without any answer the judge
        alone, on all. Raises RequestError for an answer that is none, or one too many.
        """
        import numpy as np
        import pandas as pd

        numbered = answers if isinstance(answers, Mapping) else dict(enumerate(answers, 1))
        given = {number: str(text).strip() for number, text in numbered.items()}
        given = {number: text for number, text in given.items() if text}
        options, numbers = self.classes, set(self.key["number"])
        for number, text in given.items():
            if number not in numbers:
                raise RequestError(
                    f"answers: expected one for each of the {len(numbers)} pictures at most, got "
                    f"one for number {number}; leave it out"
                )
            if text not in (*options, UNSURE):
                raise RequestError.unknown(f"answer to picture {number}", text, [*options, UNSURE])
        key = self.key[self.key["number"].isin(list(given))] if given else self.key
        rows = {}
        for kind in [kind for kind in KINDS if kind in set(key["kind"])]:
            part = key[key["kind"] == kind]
            judge = 100 * float((part["judge"] == part["asked"]).mean())
            n = len(part) if given else 0
            right = int((part["number"].map(given) == part["asked"]).sum())
            low, high = wilson(right, n) if n else (np.nan, np.nan)
            accuracy = 100 * right / n if n else np.nan
            rows[kind] = [n, right, accuracy, low, high, judge]
        columns = ["n", "right", "accuracy", "low", "high", "judge"]
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        return frame.rename_axis("pictures")

    def read_answers(self, path: Path | str) -> dict[int, str]:
        """Return the answers, by number, of a file that the site's page has saved.

        Raises RequestError for another file, or answers to another set.
        """
        path = Path(path)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            found = {int(number): str(text) for number, text in saved["answers"].items()}
            of = str(saved["set"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(
                f"{path.name}: expected answers that the page of the blind test has saved, got "
                f"{type(error).__name__}: {error}; save them there again"
            ) from error
        if of != self.digest:
            raise RequestError(
                f"{path.name}: expected answers to the set {self.digest[:12]}…, got some to "
                f"{of[:12]}…; take the set of the commit that they were given at"
            )
        return found


def make(groups: Iterable[Group], generator: torch.Generator) -> BlindTest:
    """Return the pictures of all groups as one set, in an order that `generator` draws.

    The key's columns are number (from 1), kind, asked, judge and source. Raises ValueError for
    pictures of different sizes, pixels outside [0, 1], labels of another number, or no known kind.
    """
    import numpy as np
    import pandas as pd
    import torch

    groups = list(groups)
    for group in groups:
        _check(group, groups[0])
    images = np.concatenate([np.asarray(group.images, dtype=float) for group in groups])
    parts = [
        {"kind": g.kind, "asked": list(g.asked), "judge": list(g.judged), "source": g.source}
        for g in groups
    ]
    order = torch.randperm(len(images), generator=generator).numpy()
    key = pd.concat(map(pd.DataFrame, parts)).astype(str).iloc[order].reset_index(drop=True)
    key.insert(0, "number", range(1, len(key) + 1))
    return BlindTest(_sheet(np.rint(images[order].clip(0, 1) * 255).astype(np.uint8)), key)


def _check(group: Group, first: Group) -> None:
    import numpy as np

    images, shape = np.asarray(group.images), np.asarray(first.images).shape[1:]
    if group.kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {group.kind!r}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[1:] != shape:
        raise ValueError(
            f"images of kind {group.kind!r}: expected [n, 1 or 3, H, W], all of one size, got "
            f"{list(images.shape)} beside {list(shape)}"
        )
    if not (images.size and images.min() >= -1e-6 and images.max() <= 1 + 1e-6):  # or NaN
        raise ValueError(f"images of kind {group.kind!r}: expected pixels in [0, 1]; denormalise")
    if not len(images) == len(group.asked) == len(group.judged):
        raise ValueError(
            f"{group.kind!r}: expected a class asked for and one judged for each of "
            f"{len(images)} images, got {len(group.asked)} and {len(group.judged)}"
        )


def _sheet(pictures: np.ndarray) -> bytes:
    """Return pictures [n, C, H, W] as one PNG, lossless, with nothing in it but pixels."""
    import numpy as np
    from PIL import Image

    n, channels, height, width = pictures.shape
    rows = -(-n // COLUMNS)
    blank = np.zeros((rows * COLUMNS - n, channels, height, width), dtype=np.uint8)
    tiles = np.concatenate([pictures, blank]).reshape(rows, COLUMNS, channels, height, width)
    sheet = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * height, COLUMNS * width, channels)
    file = io.BytesIO()
    Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet).save(file, "png", optimize=True)
    return file.getvalue()


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval, in %, of a rate of which `right` of `n` were seen."""
    from scipy.stats import binomtest

    interval: Any = binomtest(right, n).proportion_ci(method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def at_chance(right: int, n: int, classes: int) -> bool:
    """Return whether `right` of `n` is no more than guessing among `classes`, by its interval.

    The interval contains chance or lies below it: there is nothing to read in what is at chance.
    """
    return wilson(right, n)[0] <= 100 / classes
