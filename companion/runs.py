"""What a notebook says about itself: its figures, tables and values, published whole or not at all.

Everything is written to a staging folder first. `complete()`, in the last cell, moves it where it
belongs: there ``record.json`` is taken away first and comes back last, so that a run killed in
between is never taken for a whole one (`read_record` checks every digest).

Three places hold such folders, ``<preset>/<notebook>/``: ``figures`` what a release recorded,
``build/runs`` what `dsv reproduce` made here, ``build/by-hand`` what anyone ran by hand, with any
parameters. Each has one writer, so that none can replace another.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, SupportsFloat

from dsvlib import _files
from dsvlib._errors import DsvError, explain
from dsvlib._files import atomic_path, file_digest

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

    from companion.blind_test import BlindTest
    from dsvlib.support_set import SupportSet

SCHEMA = 1
RECORD = "record.json"
REPETITIONS = "seeds"  # folder of a place with one place of the same form for each further seed
COMMITTED = (".png", ".csv", ".json")  # the rest is made by a run, and named in what is recorded
BADGES = {
    "smoke": "smoke run · not a result",
    "quick": "digits · quick",
    "cifar10": "CIFAR-10 · reduced",
    "cifar10-ten": "CIFAR-10 · ten per class, reduced",
    "imagenette": "Imagenette 64×64 · reduced",
    "paper": "paper scale",
}
# Beside dsvlib itself: what lies between a notebook's code and its numbers and pictures.
BESIDE_THE_METHOD = (
    *("blind_test.py", "figures.py", "measures.py", "recipes.py", "runs.py", "toy_problems.py"),
    "trials.py",
)


class RecordError(DsvError):
    """A folder of figures that is not, or no longer, what one complete run published."""


def repository_root() -> Path:
    """Return the checkout; `DSV_ROOT` names it where dsvlib is installed apart from it."""
    return Path(os.environ.get("DSV_ROOT") or _files.repository_root())


def figures_root() -> Path:
    """Return the folder of what the maintainers recorded; only `dsv record` writes there."""
    return repository_root() / "figures"


def own_root() -> Path:
    """Return the folder of this checkout's own runs; only `dsv reproduce` writes there."""
    return repository_root() / "build" / "runs"


def hand_root() -> Path:
    """Return the folder of what is run by hand, which `DSV_FIGURES` may move elsewhere."""
    return Path(os.environ.get("DSV_FIGURES") or repository_root() / "build" / "by-hand")


def digest(value: object) -> str:
    """Return the sha256 of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def tagged_cells(notebook: Path) -> list[tuple[str, set[str]]]:
    """Return the source and the tags of each of a notebook's code cells."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [
            ("".join(cell["source"]), set(cell.get("metadata", {}).get("tags", ())))
            for cell in cells
            if cell["cell_type"] == "code"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DsvError(f"{notebook.name}: expected a Jupyter notebook, got {error}") from error


def code_cells(notebook: Path) -> list[str]:
    """Return the sources of a notebook's code cells, without those that papermill injected."""
    return [source for source, tags in tagged_cells(notebook) if "injected-parameters" not in tags]


def result_sources() -> list[Path]:
    """Return the sources that can change a result, sorted: the method, and little beside it."""
    beside = (Path(__file__).parent / name for name in BESIDE_THE_METHOD)
    method = (path for path in _files.PACKAGE.rglob("*.py") if path.name != "cli.py")
    return sorted([*method, *beside])


def library_digest() -> str:
    """Return the digest of the sources that can change a result."""
    home = _files.PACKAGE.parent
    return digest({str(p.relative_to(home)): file_digest(p) for p in result_sources()})


def code_digest(notebook: str) -> str:
    """Return the digest of all that makes a notebook's numbers except its parameters.

    These are its code cells, dsvlib and the lock file; the shipped classifiers that it read are in
    the record by name (`is_current`).
    """
    root = repository_root()
    source = root / "notebooks" / f"{notebook}.ipynb"
    lock = root / "requirements.lock"
    cells = code_cells(source) if source.is_file() else []
    return digest([cells, library_digest(), file_digest(lock) if lock.is_file() else ""])


def is_current(record: Mapping[str, Any]) -> bool:
    """Return whether a record was made by this code and the shipped classifiers as they are."""
    if record["code"] != code_digest(record["notebook"]):
        return False
    used: dict[str, str] = record.get("checkpoints", {})
    return used == _checkpoint_digests(used)


_kept: Path | None = None


def kept_jobs() -> Path | None:
    """Return the folder of what this run's jobs have given so far; None for a run by hand."""
    return _kept


def jobs_home(directory: Path) -> Path:
    """Return what holds the finished jobs of whole runs that publish to `directory`."""
    return directory.parents[1] / ".jobs" / "-".join(directory.parts[-2:])


def _keep_jobs(run: Run) -> None:
    """Make the folder in which finished jobs outlive a kill; what another run left there goes.

    Another run is one of other code, parameters, data or shipped classifiers. Where this one goes
    on, the time that it has taken already counts as its own.
    """
    global _kept
    if not run.context:
        _kept = None
        return
    from dsvlib.classifiers.files import shipped_digests  # torch, which the command line lacks

    home = jobs_home(run.directory)
    same = [run.code, run.data_digest, run.parameters, run.seed, shipped_digests()]
    _kept = home / digest(same)[:16]
    for other in set(home.glob("*")) - {_kept}:
        shutil.rmtree(other, ignore_errors=True)
    _kept.mkdir(parents=True, exist_ok=True)
    began = _kept / "began"
    if began.is_file():
        last = max(path.stat().st_mtime for path in _kept.iterdir())
        run.started -= max(0.0, last - float(began.read_text()))
    began.write_text(str(run.started))


def _forget_jobs() -> None:
    global _kept
    if _kept is not None:
        shutil.rmtree(_kept.parent, ignore_errors=True)
    _kept = None


_opened: set[str] = set()  # the shipped classifiers that this process has read


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "dsvlib.load_classifier":
        path = Path(arguments[0])
        if path == _files.checkpoint_path(path.stem):
            _opened.add(path.stem)


sys.addaudithook(_note_opened)  # once a process: a hook cannot be taken off


def _checkpoints_read() -> dict[str, str]:
    """Return the digests of the shipped classifiers that this process has opened."""
    return _checkpoint_digests(_opened)


def _checkpoint_digests(names: Iterable[str]) -> dict[str, str]:
    paths = {name: _files.checkpoint_path(name) for name in sorted(names)}
    return {name: file_digest(path) for name, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class Value:
    """One named number, from which the claim ledger is built."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # for reading records (`read_record`)

    claim: str
    name: str
    value: float
    std: float | None = None
    n: int | None = None
    seeds: tuple[int, ...] = ()
    unit: str = ""
    paper: float | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class SavedFigure:
    """A figure on disk; as the last value of a cell it shows the picture with its alt text."""

    name: str
    alt: str
    png: bytes = field(repr=False)
    width: int = field(repr=False)

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, Any], dict[str, Any]]:
        data = {"image/png": self.png, "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt, "width": self.width}}


@dataclass
class Run:
    """One execution of a notebook; make it with `Run.start`."""

    notebook: str
    preset: str
    seed: int
    parameters: dict[str, Any]
    badge: str
    data_digest: str
    code: str
    directory: Path
    started: float
    context: dict[str, Any]
    facts: dict[str, Any]
    values: dict[tuple[str, str], Value] = field(default_factory=dict)
    finished: bool = False

    @classmethod
    def start(
        cls,
        notebook: str,
        *,
        preset: str,
        seed: int,
        parameters: Mapping[str, Any] | None = None,
        data_digest: str = "",
        scale: str | None = None,
    ) -> Self:
        """Begin a run with an empty staging folder.

        `parameters` are the notebook's own; `scale` replaces the preset's badge text where the
        data differ from what the preset promises. Raises ValueError for a name that cannot be a
        folder or parameters that are no JSON, DsvError if the figures folder cannot be written or
        is one that only whole runs may write.
        """
        _check_name("notebook", notebook)
        _check_name("preset", preset)
        # Where the data lie differs between machines; what they are is in `data_digest`.
        kept = {k: v for k, v in (parameters or {}).items() if k != "data_root"}
        try:
            kept = json.loads(json.dumps(kept, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters: expected plain numbers and text, got {error}") from error
        context = json.loads(os.environ.get("DSV_RUN_CONTEXT", "{}"))
        badge = scale or BADGES.get(preset, preset)
        run = cls(
            notebook=notebook,
            preset=preset,
            seed=seed,
            parameters=kept,
            badge=badge if context else f"{badge} · run by hand",
            data_digest=data_digest,
            # Taken before the kernel started: a file changed since then makes the run stale.
            code=context.get("code") or code_digest(notebook),
            directory=_place(context, preset, notebook),
            started=context.get("started", time.time()),
            context=context,
            facts=git_state(),
        )
        with explain("write to", run.directory.parents[1]):
            shutil.rmtree(run.staging, ignore_errors=True)
            run.staging.mkdir(parents=True)
            _keep_jobs(run)
        atexit.register(shutil.rmtree, run.staging, ignore_errors=True)
        return run

    @property
    def staging(self) -> Path:
        """Where everything lies until `complete` publishes it to `directory`."""
        name = f"{self.preset}-{self.notebook}-{os.getpid()}"
        return self.directory.parents[1] / ".staging" / name

    def save_figure(
        self,
        fig: Figure,
        name: str,
        *,
        alt: str,
        data: pd.DataFrame | Mapping[str, np.ndarray] | None = None,
        caption: str | None = None,
    ) -> SavedFigure:
        """Stage a figure as PNG and SVG, the data behind it and a sidecar that explains it.

        `alt` states the finding for those who cannot see it. `data` is a tidy frame (CSV) or
        named arrays (NPZ). Returned as a cell's last value, the figure is shown.
        Raises ValueError without alt text or for an unusable name, DsvError on a full disk.
        """
        from companion.figures import DPI, write_figure

        if len(alt.split()) < 3:
            raise ValueError(f"alt: expected a sentence that states the finding, got {alt!r}")
        with self._staged("figure", name, alt=alt, caption=caption) as (stem, written):
            about = {"Source": self.notebook}
            written += write_figure(fig, stem, alt=alt, badge=self.badge, metadata=about)
            if data is not None:
                written.append(_write_data(stem, data))
        if "matplotlib.pyplot" in sys.modules:  # else an inline backend would draw it once more
            sys.modules["matplotlib.pyplot"].close(fig)
        png = written[0].read_bytes()
        pixels = int.from_bytes(png[16:20])  # of the header: labels may have widened the figure
        return SavedFigure(name, alt, png, round(pixels * 96 / DPI))

    def save_animation(
        self,
        frames: Mapping[str, np.ndarray],
        name: str,
        *,
        alt: str,
        caption: str | None = None,
    ) -> SavedFigure:
        """Stage pictures [H, W, 3] in [0, 1] as one animated PNG with a sidecar; return it.

        `frames` are in their order, each under what it shows, such as ``"step 20"``: the site lets
        readers move through them. Small pictures are shown at 640 pixels, and need not be enlarged.
        """
        from companion.figures import write_animation

        staged = self._staged("animation", name, alt=alt, caption=caption, frames=list(frames))
        with staged as (stem, written):
            path = write_animation(list(frames.values()), stem.with_name(f"{name}.png"), alt=alt)
            written.append(path)
        width = next(iter(frames.values())).shape[1]
        return SavedFigure(name, alt, path.read_bytes(), max(width, 640))

    def save_table(
        self, frame: pd.DataFrame, name: str, *, caption: str | None = None
    ) -> pd.DataFrame:
        """Stage a tidy table as CSV with a sidecar; return it for display."""
        with self._staged("table", name, caption=caption) as (stem, written):
            written.append(_write_data(stem, frame))
        return frame

    def save_samples(
        self, samples: SupportSet, name: str, *, caption: str | None = None
    ) -> SupportSet:
        """Stage a set as ``<name>.safetensors`` with a sidecar; return it.

        `SupportSet.load` reads it anywhere. Nothing that shows real images of a data set which
        must not be passed on belongs here.
        """
        with self._staged("samples", name, caption=caption) as (stem, written):
            written.append(stem.with_name(f"{name}.safetensors"))
            samples.save(written[0])
        return samples

    def save_blind_test(
        self, test: BlindTest, name: str = "blind_test", *, caption: str | None = None
    ) -> BlindTest:
        """Stage a blind test as ``<name>.png``, its key as CSV and a sidecar; return it."""
        with self._staged("blind test", name, caption=caption) as (stem, written):
            written += test.save(stem)
        return test

    def record(
        self,
        claim: str,
        name: str,
        value: SupportsFloat,
        *,
        std: SupportsFloat | None = None,
        n: int | None = None,
        seeds: Iterable[int] = (),
        unit: str = "",
        paper: float | None = None,
        interval: Sequence[SupportsFloat] | None = None,
        higher_is_better: bool | None = None,
        note: str = "",
    ) -> Value:
        """Record a named value for a claim; the same claim and name again replaces it.

        `paper` is the published number, `std` over `n` repetitions or `seeds` (default: the
        run's), `interval` the 95 % interval (low, high), by which rules with > and < decide
        (``companion/ledger/verdicts.py``); NaN where nothing varies, so that there is none.
        Raises ValueError for another number that is not finite, and for low > high.
        """
        self._check_open(name)
        seeds = tuple(int(seed) for seed in seeds) or (self.seed,)
        low, high = (float(end) for end in interval or (math.nan, math.nan))
        if low > high:
            raise ValueError(f"interval: expected (low, high), got ({low}, {high}); swap them")
        entry = Value(
            claim=claim,
            name=name,
            value=_finite("value", value),
            std=None if std is None else _finite("std", std),
            n=len(seeds) if n is None else int(n),
            seeds=seeds,
            unit=unit,
            paper=None if paper is None else _finite("paper", paper),
            low=None if math.isnan(low) else _finite("low", low),
            high=None if math.isnan(high) else _finite("high", high),
            higher_is_better=higher_is_better,
            note=note,
        )
        self.values[claim, name] = entry
        return entry

    def complete(self) -> None:
        """Publish everything staged; belongs in the last cell.

        Raises DsvError when called twice or when the figures folder cannot be written, before
        anything published earlier has been touched.
        """
        self._check_open("complete")
        staged = sorted(path for path in self.staging.iterdir() if path.suffix != ".json")
        sidecars = sorted(self.staging.glob("*.json"))
        record = self._facts() | {
            "run_id": os.environ.get("DSV_RUN_ID", ""),
            "checkpoints": _checkpoints_read(),
            "values": [asdict(value) for value in self.values.values()],
            "seconds": round(time.time() - self.started, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {path.name: file_digest(path) for path in staged + sidecars},
        }
        with explain("publish to", self.directory):
            # Written before anything moves: from here on no step needs free space.
            write_json(self.staging / RECORD, record | {"digest": digest(record)})
            _publish(self.staging, self.directory, staged + sidecars)
        self.finished = True
        _forget_jobs()
        figures = sum(path.suffix == ".png" for path in staged)
        sets = sum(path.suffix == ".safetensors" for path in staged)
        counts = [f"{figures} figures", f"{len(sidecars) - figures - sets} tables"]
        counts += [f"{sets} sets of samples"] if sets else []
        print(
            f"{self.notebook}: {', '.join(counts)} and {len(self.values)} values published to "
            f"{os.path.relpath(self.directory, repository_root())}"
        )

    def _check_open(self, name: str) -> None:
        if self.finished:
            raise DsvError(f"{self.notebook} is complete; run its Run.start cell again to go on")
        _check_name("name", name)
        if name == Path(RECORD).stem:
            raise ValueError(f"name: {name!r} is taken by the completion record, choose another")

    def _facts(self) -> dict[str, Any]:
        by_hand = f"notebooks/{self.notebook}.ipynb, run by hand"
        return {
            "schema": SCHEMA,
            "notebook": self.notebook,
            "preset": self.preset,
            "scale": self.badge,
            "parameters": self.parameters,
            "seed": self.seed,
            "command": self.context.get("command", by_hand),
            "by_hand": not self.context,
            "data_digest": self.data_digest,
            "code": self.code,
            **self.facts,
            "environment": _environment(str(self.parameters.get("device", "auto"))),
        }

    @contextmanager
    def _staged(
        self, kind: str, name: str, *, caption: str | None, alt: str = "", **more: object
    ) -> Iterator[tuple[Path, list[Path]]]:
        """Yield a stem and a list for what is written there; put a sidecar beside it at last."""
        self._check_open(name)
        stem, written = self.staging / name, list[Path]()
        with explain("write", self.directory / name):
            yield stem, written
            about = {"kind": kind, "name": name, "caption": caption or "", "alt": alt, **more}
            hashes = {path.name: file_digest(path) for path in written}
            write_json(self.staging / f"{name}.json", about | self._facts() | {"files": hashes})


def read_record(directory: Path) -> dict[str, Any]:
    """Return the record of a complete run after checking it and every file it names.

    Raises RecordError if the record is missing, of another schema, changed, not of this folder, or
    if a file of it is missing or changed. What was run by hand is refused among whole runs. Files
    that a recorded run leaves to a release, its `unpublished`, are known and not looked for.
    """
    where = f"{directory.parent.name}/{directory.name}"
    fix = f"run dsv reproduce --preset {directory.parent.name} --only {directory.name}"

    def broken(reason: str) -> RecordError:
        return RecordError(f"figures of {where} are not one complete run: {reason}; {fix}")

    try:
        record = dict(json.loads((directory / RECORD).read_text(encoding="utf-8")))
        named = dict(record["files"])
        own = record.pop("digest")
    except FileNotFoundError:
        raise broken(f"{RECORD} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken(f"{RECORD} cannot be read ({error})") from error
    if record.get("schema") != SCHEMA:
        raise broken(f"expected schema {SCHEMA}, got {record.get('schema')!r}")
    if own != digest(record):
        raise broken(f"{RECORD} was changed after the run")
    try:
        _check_types(record)
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise broken(f"{RECORD} holds what no run writes ({reason})") from error
    if directory.parts[-2:] != (record["preset"], record["notebook"]):
        raise broken(f"{RECORD} is that of {record['preset']}/{record['notebook']}")
    here = directory.resolve()
    if record["by_hand"] and any(
        here.is_relative_to(root.resolve()) for root in (figures_root(), own_root())
    ):
        raise broken("they were run by hand, with parameters of one's own")
    for name, expected in named.items():
        path = directory / name
        if not path.is_file():
            raise broken(f"{name} is missing")
        if file_digest(path) != expected:
            raise broken(f"{name} was changed after the run")
    return record


def _check_types(record: Mapping[str, Any]) -> None:
    """Raise ValueError unless texts are texts, numbers numbers and names names: pages show them."""
    from pydantic import TypeAdapter

    text = json.dumps([record[key] for key in ("seed", "by_hand", "scale", "command", "values")])
    kind = TypeAdapter(tuple[int, bool, str, str, list[Value]])
    *_, values = kind.validate_json(text, strict=True)
    names = [record["preset"], record["notebook"], *(value.name for value in values)]
    for name in [*names, *(part for file in record["files"] for part in file.rsplit(".", 1))]:
        _check_name("name", name)


def copy_recorded(
    source: Path, target: Path, shrink: Callable[[Path], object] | None = None
) -> None:
    """Publish a whole run in `target` as it is committed: pictures, tables and what explains them.

    `shrink` may rewrite a picture. What is not committed keeps its name and digest under
    `unpublished`, in the record and in the sidecar of each figure.
    """
    record = read_record(source)
    staging = repository_root() / "build" / f".recording-{os.getpid()}"
    with explain("write to", target):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            for name in record["files"]:
                if name.endswith(COMMITTED):
                    shutil.copyfile(source / name, staging / name)
            if shrink is not None:
                for picture in sorted(staging.glob("*.png")):
                    shrink(picture)
            for about in sorted(staging.glob("*.json")):
                sidecar = json.loads(about.read_text(encoding="utf-8"))
                write_json(about, _committed(sidecar, staging))
            record = _committed(record, staging)
            write_json(staging / RECORD, record | {"digest": digest(record)})
            _publish(staging, target, [staging / name for name in record["files"]])
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _committed(about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a record or sidecar whose `files` are those that are committed, as in `folder`."""
    kept = {n: file_digest(folder / n) for n in about["files"] if n.endswith(COMMITTED)}
    rest = {name: own for name, own in about["files"].items() if name not in kept}
    return {**about, "files": kept, "unpublished": about.get("unpublished", {}) | rest}


def _publish(staging: Path, target: Path, staged: Sequence[Path]) -> None:
    """Move the staged files into place: the old record goes first, the new one comes last."""
    target.mkdir(parents=True, exist_ok=True)
    (target / RECORD).unlink(missing_ok=True)
    for path in staged:
        os.replace(path, target / path.name)
    current = {path.name for path in staged}
    for path in target.iterdir():
        if path.is_file() and path.name not in current:
            path.unlink()
    os.replace(staging / RECORD, target / RECORD)
    shutil.rmtree(staging, ignore_errors=True)


def _write_data(stem: Path, data: pd.DataFrame | Mapping[str, np.ndarray]) -> Path:
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        indexed = data.index.name is not None or isinstance(data.index, pd.MultiIndex)
        with atomic_path(stem.with_name(f"{stem.name}.csv")) as temporary:
            data.to_csv(temporary, index=indexed, lineterminator="\n", float_format="%.6g")
        return stem.with_name(f"{stem.name}.csv")
    import numpy as np

    arrays: dict[str, Any] = dict(data)
    with atomic_path(stem.with_name(f"{stem.name}.npz")) as temporary, temporary.open("wb") as out:
        np.savez_compressed(out, **arrays)
    return stem.with_name(f"{stem.name}.npz")


def _place(context: Mapping[str, Any], preset: str, notebook: str) -> Path:
    """Return where a run publishes: where its context says, or among what is run by hand."""
    if context:
        place = repository_root() / str(context["directory"])
        if place.parts[-2:] != (preset, notebook):
            raise ValueError(
                f"Run.start: expected {'/'.join(place.parts[-2:])}, which is being run, "
                f"got {preset}/{notebook}; correct the names in the notebook"
            )
        return place
    root = hand_root().resolve()
    for kept in (figures_root(), own_root()):
        if root.is_relative_to(kept.resolve()):
            raise DsvError(
                f"DSV_FIGURES: expected a folder outside of {kept.name}, which holds whole runs "
                f"only, got {root}; leave it unset"
            )
    return hand_root() / preset / notebook


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_-]*", str(name)):
        raise ValueError(f"{what}: expected letters, digits, _ and -, got {name!r}")


def _finite(what: str, number: SupportsFloat) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{what}: expected a finite number, got {float(number)}")
    return float(number)


def git_state() -> dict[str, Any]:
    """Return the commit and whether the checkout differs from it; None where there is no git."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(repository_root()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}


def _environment(device: str) -> dict[str, Any]:
    """Return device, threads and versions, without importing torch where no one did."""
    torch = sys.modules.get("torch")
    if torch is not None and device.startswith(("auto", "cuda")):
        available = torch.cuda.is_available()
        device = f"cuda ({torch.cuda.get_device_name()})" if available else "cpu"
    threads = torch.get_num_threads() if torch is not None else os.environ.get("OMP_NUM_THREADS")
    return {
        "device": device,
        "threads": int(threads or os.cpu_count() or 1),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": _version("torch"),
        "dsvlib": _version("dsvlib"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))
