"""Where a long synthesis keeps its state, so that a run that was killed goes on where it stood.

One safetensors file: tensors (X, Λ, the optimiser's moments, the generator's state), and JSON with
the step, the history and a digest of everything that decides how the run goes on. It is written
whole or not at all, also under `kill -9`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsvlib._files import atomic_path, read_safetensors

FORMAT = "companion.runs-state.v1"


@dataclass(frozen=True)
class State:
    """A run after `step` steps: its tensors and the rows of its history."""

    step: int
    tensors: dict[str, Tensor]
    rows: list[dict[str, float]]


class Checkpoint:
    """One run's file: `write` the state every `every` steps, `read` it back, `remove` it at last.

    Keywords other than `every` name what decides the run (config, model, labels, …): mappings of
    tensors, sequences, tensors or anything whose `repr` says it all. A file that was written with
    another one of them is refused by `read`.
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int, **identity: object) -> None:
        self.path = Path(path)
        self.every = every
        self.digests = {name: _digest(value) for name, value in identity.items()}
        if self.path.is_dir():
            raise ValueError(
                f"checkpoint: expected a file, got the folder {str(path)!r}; name a file in it"
            )

    def write(self, state: State) -> None:
        """Write the state, whole or not at all."""
        from safetensors.torch import save_file

        header = {
            "format": FORMAT,
            "step": json.dumps(state.step),
            "rows": json.dumps(state.rows),  # a float's repr comes back as the same float
            "digests": json.dumps(self.digests),
        }
        # clones: safetensors refuses tensors that share memory
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors.items()}
        with atomic_path(self.path) as temporary:
            save_file(tensors, str(temporary), metadata=header)

    def read(self) -> State | None:
        """Return the state, None where there is no file yet.

        Raises ValueError for a damaged or foreign file, or one of another run.
        """
        if not self.path.exists():
            return None
        tensors, header = read_safetensors(self.path, FORMAT, "synthesize(checkpoint=…)")
        digests: dict[str, Any] = json.loads(header["digests"])
        other = [name for name, digest in self.digests.items() if digests.get(name) != digest]
        if other:
            raise ValueError(
                f"{self.path}: expected the checkpoint of this run, got one of another "
                f"{' and '.join(other)}; remove the file or name another"
            )
        return State(json.loads(header["step"]), tensors, json.loads(header["rows"]))

    def remove(self) -> None:
        """Remove the file of a run that is finished."""
        self.path.unlink(missing_ok=True)


def _digest(value: object) -> str:
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
