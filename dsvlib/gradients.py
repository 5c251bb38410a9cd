"""The gradients gᵢ = ∇_θ L(Φ(xᵢ; θ), yᵢ) of a frozen classifier: their weighted sum, and products.

    Gᵀλ = Σᵢ λᵢ gᵢ      the gradient of one weighted sum: one backward pass whatever n is
    Gv  = (v·gᵢ)ᵢ       the change of the losses along v: one forward-mode pass
    K = GGᵀ, c = Gθ     in panels of as many rows of G as may be held

The first two form no gᵢ. Σᵢ λᵢ gᵢ is what stationarity compares with −θ (`conditions`).

Shapes: x [n, C, H, W], y int64 [n] or float [n, K], λ [n]; G [n, P] has a row per sample; θ, v [P];
K [n, n] and c [n] are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from dsvlib._progress import progress_bar
from dsvlib._validation import (
    as_labels,
    check_count,
    check_finite,
    check_inputs,
    check_label_range,
    check_same_length,
    select_params,
)
from dsvlib.frozen import evaluation_mode, read_logits
from dsvlib.logits import LossFn, cross_entropy
from dsvlib.support_set import SupportSet


class FrozenClassifier:
    """Φ(·; θ) and the loss L of its logits. Use it inside `evaluation_mode(model)`.

    θ is flattened once; every call after that is one forward and one backward pass that can be
    differentiated again. Use the functions below unless you write a loop of your own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Mapping[str, Tensor] | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        # detached leaves share the model's memory: nothing is copied and no .grad is touched
        self.theta = {
            name: value.detach().requires_grad_()
            for name, value in select_params(model, params).items()
        }
        self.flat_theta = flatten(self.theta.values()).detach()
        self.model = model
        self.loss_fn = loss_fn or cross_entropy
        self._checked: Tensor | None = None  # labels already found in range, in the inner loop

    def losses(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample [n] and the logits [n, K]."""
        theta = self.flat_theta
        if inputs.dtype != theta.dtype or inputs.device != theta.device:
            raise ValueError(
                f"inputs: expected {theta.dtype} on {theta.device} as the model's parameters, got "
                f"{inputs.dtype} on {inputs.device}; move one to the other with .to(…)"
            )
        logits = read_logits(self.model, self.theta, inputs)
        # a loss of one's own may code labels as it likes; labels are checked once, not every step
        if self.loss_fn is cross_entropy and labels is not self._checked:
            check_label_range(labels, logits.shape[1])
            self._checked = labels
        losses = self.loss_fn(logits, labels)
        if losses.shape != (len(inputs),):
            raise ValueError(
                f"loss_fn: expected one loss per sample, shape [{len(inputs)}], got "
                f"{list(losses.shape)}; leave out the reduction (reduction='none')"
            )
        return losses, logits

    def gradient(
        self, losses: Tensor, multipliers: Tensor, *, differentiable: bool = True
    ) -> tuple[Tensor, ...]:
        """Return Σᵢ λᵢ ∇_θ Lᵢ, one tensor per parameter, from the losses of one forward pass."""
        if multipliers.dtype != losses.dtype or multipliers.device != losses.device:
            raise ValueError(
                f"multipliers: expected {losses.dtype} on {losses.device} as the losses, got "
                f"{multipliers.dtype} on {multipliers.device}; move one to the other with .to(…)"
            )
        return torch.autograd.grad(
            torch.dot(multipliers, losses),
            list(self.theta.values()),
            create_graph=differentiable,
            materialize_grads=True,  # a parameter that the output ignores has gradient zero
        )


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return the tensors as one vector [P], in their order."""
    return torch.cat([value.reshape(-1) for value in tensors])


def weighted_gradient(
    model: nn.Module,
    samples: SupportSet,
    *,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
) -> dict[str, Tensor]:
    """Return Σᵢ λᵢ ∇_θ L(Φ(xᵢ; θ), yᵢ) by parameter name (DSV §4.1).

    Differentiable in `samples.inputs` and `samples.multipliers` where they require grad.

    Parameters
    ----------
    model
        Any classifier [n, …] → [n, K]; read in evaluation mode, left as it was.
    samples
        The candidates.
    params
        The parameters θ to differentiate by (a subset of ``dict(model.named_parameters())``);
        default: all that require grad.
    loss_fn
        ``loss_fn(logits, labels) -> [n]``, one loss per sample without reduction, so that a mean
        cannot rescale λ. Default: cross-entropy.

    Raises ValueError for labels out of range, a loss that was reduced, unknown parameter names or
    a model without parameters that require grad.
    """
    classifier = FrozenClassifier(model, params=params, loss_fn=loss_fn)
    wanted = samples.inputs.requires_grad or samples.multipliers.requires_grad
    differentiable = torch.is_grad_enabled() and wanted
    with evaluation_mode(model), torch.enable_grad():
        losses, _ = classifier.losses(samples.inputs, samples.labels)
        gradient = classifier.gradient(losses, samples.multipliers, differentiable=differentiable)
    return dict(zip(classifier.theta, gradient, strict=True))


def per_sample_gradients(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | Sequence[int],
    *,
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return the gradients gᵢ as a matrix [n, P] and θ [P], on the model's device.

    Parameters as in `fit_multipliers`; memory is 4nP bytes in float32. The model is left as it was.
    Raises ValueError for shapes or labels that do not fit, or gradients that are not finite.
    """
    check_count("batch_size", batch_size)
    samples = SampleGradients(
        model, inputs, labels, params=params, loss_fn=loss_fn, batch_size=batch_size
    )
    with evaluation_mode(model):
        samples.logits()  # labels and losses are checked here
        gradients = samples.all()
    check_finite("gradients of the samples", gradients)
    return gradients, samples.theta


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
        self.classifier = FrozenClassifier(model, params=params, loss_fn=loss_fn)
        self.theta = self.classifier.flat_theta
        if not bool(self.theta.any()):
            raise ValueError(
                "params: expected parameters that are not all zero, got θ = 0, which every λ = 0 "
                "explains; train the model or choose other params"
            )
        self.inputs = check_inputs(inputs).detach().to(self.theta)
        self.labels = as_labels(labels).to(self.theta.device)
        check_same_length(inputs=len(self.inputs), labels=len(self.labels))
        self.batch_size = batch_size
        self._held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def hold(self, memory: float) -> None:
        """Keep G if it takes at most `memory` gigabytes: products cost two reads of it then."""
        if 1e-9 * len(self) * len(self.theta) * self.theta.element_size() <= memory:
            self._held = self.all()

    def logits(self) -> Tensor:
        """Return the logits of all samples, [n, K]; raise ValueError for labels or losses amiss."""
        seen = []
        with torch.no_grad():
            for batch in self._batches(None):
                losses, logits = self.classifier.losses(self.inputs[batch], self.labels[batch])
                check_finite("losses of the samples", losses)
                seen.append(logits)
        return torch.cat(seen)

    def weighted_sum(self, multipliers: Tensor, index: Tensor | None = None) -> Tensor:
        """Return Gᵀλ, [P], over the samples at `index` (default: all)."""
        if self._held is not None:
            if index is not None:
                multipliers = torch.zeros_like(multipliers).index_copy(0, index, multipliers[index])
            return self._held.T @ multipliers
        total = torch.zeros_like(self.theta)
        with torch.enable_grad():
            for batch in self._batches(index):
                losses, _ = self.classifier.losses(self.inputs[batch], self.labels[batch])
                own = multipliers[batch]
                total += flatten(self.classifier.gradient(losses, own, differentiable=False))
        return total

    def directional(self, direction: Tensor, index: Tensor | None = None) -> Tensor:
        """Return Gv, [n], for the samples at `index` (default: all) and 0 elsewhere."""
        out = torch.zeros(len(self)).to(self.theta)
        if self._held is not None:
            change = self._held @ direction
            return change if index is None else out.index_copy(0, index, change[index])
        theta = self._plain_theta()
        parts = direction.split([value.numel() for value in theta.values()])
        tangent = {k: p.view_as(theta[k]) for k, p in zip(theta, parts, strict=True)}
        with torch.no_grad():
            for batch in self._batches(index):
                x, y = self.inputs[batch], self.labels[batch]
                out[batch] = jvp(lambda t, x=x, y=y: self._losses(t, x, y), (theta,), (tangent,))[1]
        return out

    def all(self) -> Tensor:
        """Return G, [n, P]."""
        return self.fill(self.theta.new_empty(len(self), len(self.theta)), 0)

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
        gram = np.tril(gram)
        gram += np.tril(gram, -1).T
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
        # labels were checked by `logits`: under torch.func their values cannot be looked at
        return self.classifier.loss_fn(read_logits(self.classifier.model, theta, inputs), labels)

    def _plain_theta(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.classifier.theta.items()}

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
