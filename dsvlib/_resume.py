"""What a synthesis holds between two steps, and the file that lets a killed run go on from there.

The file is one of safetensors: tensors (X, Λ, Adam's moments, the generator's state), and JSON with
the counts of steps, the history and a digest of everything that decides how the run goes on. It is
written whole or not at all, also under `kill -9`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsvlib._files import atomic_path, read_safetensors
from dsvlib._schedule import has_settled

FORMAT = "dsvlib.run-state.v1"


@dataclass
class State:
    """What a run holds between two steps: all that the rest of it depends on."""

    x: Tensor  # [n, C, h, w], at the size of the stage
    multipliers: Tensor  # [n]
    labels: Tensor
    generator: torch.Generator
    rates: tuple[float, float]  # of X and of Λ
    betas: tuple[float, float]
    stage: int = 0
    local: int = 0  # steps taken in this stage
    step: int = 0  # steps taken in all
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.finite = (self.x, self.multipliers, self.labels)  # where the loss was last finite

    def enter(self, stage: int, x: Tensor) -> None:
        """Begin a stage with X at its size: Adam starts afresh, Λ stays."""
        self.stage, self.local = stage, 0
        self.lead(x, self.multipliers)

    def lead(self, x: Tensor, multipliers: Tensor) -> None:
        """Make X and Λ leaves of an Adam of their own."""
        self.x, self.multipliers = (v.detach().clone().requires_grad_() for v in (x, multipliers))
        groups = [
            {"params": [value], "lr": rate}
            for value, rate in zip((self.x, self.multipliers), self.rates, strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, betas=self.betas)

    def move(self, slopes: Sequence[Tensor], factor: float) -> None:
        """Take Adam's step along the slopes, its rates times `factor`."""
        self.finite = (self.x.detach().clone(), self.multipliers.detach().clone(), self.labels)
        for group, rate, slope in zip(self.optimizer.param_groups, self.rates, slopes, strict=True):
            group["lr"] = rate * factor
            group["params"][0].grad = slope
        self.optimizer.step()
        self.step += 1
        self.local += 1

    def drop_negative(self) -> bool:
        """Drop samples with λ < 0 and their part of Adam's moments; False if none would be left."""
        keep = self.multipliers.detach() >= 0
        if not bool(keep.any()):
            return False
        if not bool(keep.all()):
            moments = self.optimizer.state_dict()["state"]
            self.labels = self.labels[keep]
            self.lead(self.x.detach()[keep], self.multipliers.detach()[keep])
            self.remember({i: _at(values, keep) for i, values in moments.items()})
        return True

    def remember(self, moments: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Give Adam the moments of X (0) and Λ (1)."""
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})

    def go_back(self) -> None:
        """Return to the samples whose loss was last seen to be finite."""
        self.x, self.multipliers, self.labels = self.finite

    def log(self, terms: Mapping[str, Tensor], *, every: int, last: bool) -> bool:
        """Add a row for the step to come, if it is the first, the last or one of `every`."""
        number = self.step + 1
        wanted = number == 1 or last or number % every == 0
        if wanted:
            self.rows.append({"step": number} | {k: float(v.detach()) for k, v in terms.items()})
        return wanted

    def settled(self, tolerance: float) -> bool:
        """Whether the loss changed by less than this fraction between two rows of this stage."""
        own = [row["total"] for row in self.rows[-2:] if row["step"] > self.step - self.local]
        return has_settled(own, tolerance)


class Checkpoint:
    """One run's file: `write` the state every `every` steps, `read` it back, `remove` it at last.

    Keywords other than `every` name what decides the run (config, model, labels, …): mappings of
    tensors, sequences, tensors or anything whose `repr` says it all. A file that was written with
    another one of them is refused by `read`.
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int, **identity: object) -> None:
        self.path = Path(path)
        self.every = every
        self.digests = {name: value_digest(value) for name, value in identity.items()}
        if self.path.is_dir():
            raise ValueError(
                f"checkpoint: expected a file, got the folder {str(path)!r}; name a file in it"
            )

    def write(self, state: State) -> None:
        """Write the state, whole or not at all."""
        from safetensors.torch import save_file

        header = {
            "format": FORMAT,
            "counts": json.dumps([state.stage, state.local, state.step]),
            "rows": json.dumps(state.rows),  # a float's repr comes back as the same float
            "digests": json.dumps(self.digests),
        }
        tensors = {"x": state.x, "multipliers": state.multipliers, "labels": state.labels}
        tensors["generator"] = state.generator.get_state()
        tensors |= {f"finite {i}": value for i, value in enumerate(state.finite)}
        for group, moments in state.optimizer.state_dict()["state"].items():
            tensors |= {f"adam {group} {name}": value for name, value in moments.items()}
        # clones: safetensors refuses tensors that share memory
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        with atomic_path(self.path) as temporary:
            save_file(tensors, str(temporary), metadata=header)

    def read_into(self, state: State) -> None:
        """Put `state` where the file left it, its generator too; do nothing if there is no file.

        Raises ValueError for a damaged or foreign file, or one of another run.
        """
        if not self.path.exists():
            return
        tensors, header = read_safetensors(self.path, FORMAT, "synthesize(checkpoint=…)")
        digests: dict[str, Any] = json.loads(header["digests"])
        other = [name for name, digest in self.digests.items() if digests.get(name) != digest]
        if other:
            raise ValueError(
                f"{self.path}: expected the checkpoint of this run, got one of another "
                f"{' and '.join(other)}; remove the file or name another"
            )
        placed = {name: value.to(state.x.device) for name, value in tensors.items()}
        state.stage, state.local, state.step = json.loads(header["counts"])
        state.rows = json.loads(header["rows"])
        state.labels = placed["labels"]
        state.finite = (placed["finite 0"], placed["finite 1"], placed["finite 2"])
        state.generator.set_state(tensors["generator"])
        state.lead(placed["x"], placed["multipliers"])
        names = ("step", "exp_avg", "exp_avg_sq")
        state.remember({i: {k: tensors[f"adam {i} {k}"] for k in names} for i in (0, 1)})

    def remove(self) -> None:
        """Remove the file of a run that is finished."""
        self.path.unlink(missing_ok=True)


def _at(moments: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """Return Adam's moments of the samples to keep; its count of steps has no samples."""
    return {name: value[keep] if value.ndim else value for name, value in moments.items()}


def value_digest(value: object) -> str:
    """Return the SHA-256 of a value: mappings, sequences, tensors, and what its `repr` says."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: object) -> Iterable[bytes]:
    """Yield bytes that say what `value` is: tensors by dtype, shape and content."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()
