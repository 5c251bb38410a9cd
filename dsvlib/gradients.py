"""The gradients of many samples, gᵢ = ∇_θ L(Φ(xᵢ; θ), yᵢ), as a matrix G too large to keep.

What is wanted from G are products, and each streams over batches of samples:

    Gᵀλ = Σᵢ λᵢ gᵢ      one weighted backward pass; no gᵢ is formed
    Gv  = (v·gᵢ)ᵢ       the change of the losses along v: one forward-mode pass; no gᵢ is formed
    K = GGᵀ, c = Gθ     in panels of as many rows of G as may be held

Shapes: G [n, P] has a row per sample; θ, v [P]; λ [n]; K [n, n] and c [n] are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from dsvlib._progress import progress_bar
from dsvlib._validation import as_labels, check_finite, check_inputs, check_same_length
from dsvlib.conditions import Conditions
from dsvlib.logits import LossFn


class SampleGradients:
    """G of one frozen classifier at given samples. Use it inside `evaluation_mode(model)`.

    `inputs` and `labels` are the samples on the model's device, `theta` is θ as one vector.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor | Sequence[int],
        *,
        params: Mapping[str, Tensor] | None = None,
        loss_fn: LossFn | None = None,
        batch_size: int = 64,
    ) -> None:
        self.conditions = Conditions(model, params=params, loss_fn=loss_fn)
        self.theta = self.conditions.flat_theta
        if not bool(self.theta.any()):
            raise ValueError(
                "params: expected parameters that are not all zero, got θ = 0, which every λ = 0 "
                "explains; train the model or choose other params"
            )
        self.inputs = check_inputs(inputs).detach().to(self.theta)
        self.labels = as_labels(labels).to(self.theta.device)
        check_same_length(inputs=len(self.inputs), labels=len(self.labels))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.inputs)

    def logits(self) -> Tensor:
        """Return the logits of all samples, [n, K]; raise ValueError for labels or losses amiss."""
        seen = []
        with torch.no_grad():
            for batch in self._batches(None):
                losses, logits = self.conditions.losses(self.inputs[batch], self.labels[batch])
                check_finite("losses of the samples", losses)
                seen.append(logits)
        return torch.cat(seen)

    def weighted_sum(self, multipliers: Tensor, index: Tensor | None = None) -> Tensor:
        """Return Gᵀλ, [P], over the samples at `index` (default: all)."""
        total = torch.zeros_like(self.theta)
        with torch.enable_grad():
            for batch in self._batches(index):
                losses, _ = self.conditions.losses(self.inputs[batch], self.labels[batch])
                parts = self.conditions.gradient(losses, multipliers[batch], differentiable=False)
                total += torch.cat([part.reshape(-1) for part in parts])
        return total

    def directional(self, direction: Tensor, index: Tensor | None = None) -> Tensor:
        """Return Gv, [n], for the samples at `index` (default: all) and 0 elsewhere."""
        theta = self._plain_theta()
        parts = direction.split([value.numel() for value in theta.values()])
        tangent = {k: p.view_as(theta[k]) for k, p in zip(theta, parts, strict=True)}
        out = torch.zeros(len(self)).to(self.theta)
        with torch.no_grad():
            for batch in self._batches(index):
                x, y = self.inputs[batch], self.labels[batch]
                out[batch] = jvp(lambda t, x=x, y=y: self._losses(t, x, y), (theta,), (tangent,))[1]
        return out

    def fill(self, rows: Tensor, first: int) -> Tensor:
        """Write the gradients of samples first, first + 1, … into `rows` [b, P] and return it."""
        theta = self._plain_theta()
        each = vmap(grad(lambda t, x, y: self._losses(t, x[None], y[None])[0]), (None, 0, 0))
        with torch.no_grad():
            for start in range(0, len(rows), self.batch_size):
                part = slice(first + start, first + min(start + self.batch_size, len(rows)))
                gradients = each(theta, self.inputs[part], self.labels[part])
                columns = 0
                for value in gradients.values():
                    flat = value.reshape(len(value), -1)  # a scalar parameter has [b] here
                    rows[start : start + len(flat), columns : columns + flat.shape[1]] = flat
                    columns += flat.shape[1]
        return rows

    def gram(self, memory: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return K = GGᵀ [n, n] and c = Gθ [n], with as many rows of G held as `memory` GB allow.

        G is read in panels of rows that are held, each against strips of the rows after it that are
        computed for it: one panel is enough where G fits. Products are summed in float64 although
        the rows are in the model's dtype: K is positive semidefinite to 1e-16 and not to 1e-7.
        """
        count, width = len(self), len(self.theta)
        panel, strip = self._panel_and_strip(memory)
        held = self.theta.new_empty(panel, width)
        passing = self.theta.new_empty(strip if panel < count else 0, width)
        gram, projection = np.zeros((count, count)), np.zeros(count)
        for start in progress_bar(range(0, count, panel), "Gram matrix"):
            stop = min(start + panel, count)
            rows = self.fill(held[: stop - start], start)
            projection[start:stop] = _product(rows, self.theta[None])[:, 0]
            for first in range(start, stop, strip):  # inside the panel, the lower triangle only
                last = min(first + strip, stop)
                own = rows[first - start : last - start]
                gram[first:last, start:last] = _product(own, rows[: last - start])
            for first in range(stop, count, strip):
                last = min(first + strip, count)
                others = self.fill(passing[: last - first], first)
                gram[first:last, start:stop] = _product(others, rows)
        _mirror(gram)
        return gram, projection

    def _panel_and_strip(self, memory: float) -> tuple[int, int]:
        """Return how many rows of G are held, and how many pass by at a time."""
        count, width = len(self), len(self.theta)
        # K, its eigenvectors and root, and the solver's copies of them come after G is let go
        needed = 56e-9 * count**2
        if needed > memory:
            raise ValueError(
                f"memory: expected at least {needed:.3g} GB for the Gram matrix of {count} "
                f"samples, got {memory:g}; raise NNLSConfig.memory, pass fewer samples, or use "
                f"method='gradient'"
            )
        capacity = int((1e9 * memory - 8 * count**2) / (width * self.theta.element_size()))
        if capacity < 4:
            raise ValueError(
                f"memory: expected room for at least 4 gradients of {width} parameters, got "
                f"{memory:g} GB; raise NNLSConfig.memory, restrict params, or use method='gradient'"
            )
        strip = min(256, max(1, capacity // 4), count)
        return (count if capacity >= count else capacity - strip), strip

    def _losses(self, theta: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        # native operations: the rewritten ones serve double backward, not torch.func
        logits = functional_call(self.conditions.model, theta, (inputs,))
        return self.conditions.loss_fn(logits, labels)

    def _plain_theta(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.conditions.theta.items()}

    def _batches(self, index: Tensor | None) -> Iterator[Tensor]:
        index = torch.arange(len(self)) if index is None else index
        return iter(index.to(self.theta.device).split(self.batch_size))


def _product(left: Tensor, right: Tensor) -> NDArray[np.float64]:
    """Return left @ rightᵀ in float64, converting a slab of columns at a time (64 MB)."""
    total = np.zeros((len(left), len(right)))
    slab = max(64, 8_000_000 // (len(left) + len(right)))
    for start in range(0, left.shape[1], slab):
        a, b = (_double(side[:, start : start + slab]) for side in (left, right))
        total += (a @ b.T).cpu().numpy()
    return total


def _double(value: Tensor) -> Tensor:
    return value.cpu().double() if value.device.type == "mps" else value.double()


def _mirror(matrix: NDArray[np.float64]) -> None:
    """Copy the lower triangle to the upper one, without a second matrix."""
    for first in range(0, len(matrix), 256):
        last = first + 256
        matrix[:first, first:last] = matrix[first:last, :first].T
        block = matrix[first:last, first:last]
        block[:] = np.tril(block) + np.tril(block, -1).T
