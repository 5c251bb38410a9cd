"""The gradients gᵢ = ∇_θ L(Φ(xᵢ; θ), yᵢ) of a frozen classifier: their weighted sum, and products.

    Gᵀλ = Σᵢ λᵢ gᵢ      the gradient of one weighted sum: one backward pass whatever n is
    Gv  = (v·gᵢ)ᵢ       the derivative of v·Gᵀu in u: two backward passes
    K = GGᵀ, c = Gθ     in panels of as many rows of G as may be held

The first two form no gᵢ. Σᵢ λᵢ gᵢ is what stationarity compares with −θ (`conditions`).

Shapes: x [n, C, H, W], y int64 [n] or float [n, K], λ [n]; G [n, P] has a row per sample; θ, v [P];
K [n, n] and c [n] are float64 on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad, vmap

from dsvlib._progress import progress_bar
from dsvlib._second_derivatives import check_not_severed, graph
from dsvlib._validation import (
    as_labels,
    check_count,
    check_finite,
    check_gradients_on,
    check_inputs,
    check_label_range,
    check_same_length,
    select_params,
)
from dsvlib.frozen import evaluation_mode, read_logits
from dsvlib.logits import CrossEntropy, LossFn, check_scores, cross_entropy
from dsvlib.support_set import SupportSet, as_targets

# For each pair of samples: K, its eigenvectors and root, and the solver's copies of them, which
# come after G is let go.
GRAM_GIGABYTES = 56e-9


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
        check_gradients_on()
        chosen = select_params(model, params)
        _check_weights(model, chosen)
        # copies: a network may clamp its weights as it reads, and no .grad is touched
        self.theta = {
            name: value.detach().clone().requires_grad_() for name, value in chosen.items()
        }
        self.flat_theta = flatten(self.theta.values()).detach()
        self.model = model
        self.loss_fn = loss_fn or cross_entropy
        self._checked: Tensor | None = None  # labels already found in range, in the inner loop
        self._independent = self._connected = False  # seen to be so, at the first forward pass

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits [n, K].

        Raises ValueError where a sample's logits depend on the others of its batch, or where a
        derivative in the inputs is wanted and the forward pass has none.
        """
        theta = self.flat_theta
        if inputs.dtype != theta.dtype or inputs.device != theta.device:
            raise ValueError(
                f"inputs: expected {theta.dtype} on {theta.device} as the model's parameters, got "
                f"{inputs.dtype} on {inputs.device}; move one to the other with .to(…)"
            )
        if not self._independent:
            self._check_independence(inputs.detach())
            self._independent = True
        logits = read_logits(self.model, self.theta, inputs).to(theta.dtype)
        if inputs.requires_grad and torch.is_grad_enabled() and not self._connected:
            source = torch.autograd.graph.get_gradient_edge(inputs).node
            if not any(node is source for node in graph(logits)):
                raise ValueError(
                    "model: expected logits that can be differentiated in the inputs, got a "
                    "forward pass that cuts the graph; take torch.no_grad, .detach(), .data and "
                    "NumPy out of it"
                )
            self._connected = True
        return logits

    def _check_independence(self, inputs: Tensor) -> None:
        """Compare the logits of single samples with those they have among others."""
        few = inputs[:4]
        with torch.no_grad():
            try:
                among = read_logits(self.model, self.theta, torch.cat([few, few / 2]))[: len(few)]
            except Exception:
                return  # the inputs themselves will meet with the same
            try:
                alone = torch.cat([read_logits(self.model, self.theta, x[None]) for x in few])
            except ValueError:  # batch norm that lacks statistics cannot read a single sample
                alone = torch.full_like(among, torch.inf)
        if not bool(torch.isfinite(among).all()):
            return  # whoever reads them will say so
        apart, size = float((among - alone).abs().max()), float(among.abs().max())
        # kernels sum in another order for another batch; TensorFloat-32 has 10 bits
        rounding = 1e-3 if among.device.type == "cpu" else 1e-2
        if torch.finfo(among.dtype).bits < 32:
            rounding = 0.05
        if not apart <= rounding * size:
            raise ValueError(
                f"model: expected the logits of a sample to depend on that sample alone, got "
                f"others among others (apart by {apart:.3g}, logits up to {size:.3g}); give batch "
                f"norms running statistics, and let dropout follow self.training"
            )

    def losses(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample [n] and the logits [n, K]."""
        logits = self.logits(inputs)
        # a loss of one's own may code labels as it likes; labels are checked once, not every step
        if isinstance(self.loss_fn, CrossEntropy) and labels is not self._checked:
            check_label_range(as_labels(labels), logits.shape[1])
            check_scores(logits.detach())
            self._checked = labels
        losses = self.loss_fn(logits, labels.clone())  # it may code them anew in place
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
        if not losses.requires_grad:
            raise ValueError(
                "model: expected losses that can be differentiated in the parameters, got a "
                "forward pass or a loss_fn that cuts the graph, or params that it does not use; "
                "take torch.no_grad, .detach(), .data and NumPy out of it"
            )
        parts = torch.autograd.grad(
            torch.dot(multipliers, losses),
            list(self.theta.values()),
            create_graph=differentiable,
            materialize_grads=True,  # a parameter that the output ignores has gradient zero
        )
        # torch 2.8's zeros of that kind would ask for gradients of their own
        return parts if differentiable else tuple(part.detach() for part in parts)


def _check_weights(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the first parameter or buffer that is not finite."""
    named = dict(model.named_parameters()) | dict(params)
    bad = {k: ~torch.isfinite(v) for k, v in named.items()}
    # a buffer may hold −∞ by design, as the masks of attention do
    bad |= {k: torch.isnan(v) for k, v in model.named_buffers()}
    if bad and bool(torch.stack([entries.any() for entries in bad.values()]).any()):
        name = next(k for k, entries in bad.items() if bool(entries.any()))
        raise ValueError(
            f"model: expected finite weights, got NaN or infinite ones in {name!r} "
            f"({int(bad[name].sum())} of {bad[name].numel()}); load or train it again"
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
        read = as_labels if loss_fn is None else as_targets  # a loss of one's own codes its labels
        self.labels = read(labels).to(self.theta.device)
        check_same_length(inputs=len(self.inputs), labels=len(self.labels))
        self.batch_size = batch_size
        self._held: Tensor | None = None
        self._plain = self._compared = False

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
        for batch in self._batches(index):
            out[batch] = self._along(direction, self.inputs[batch], self.labels[batch])
        return out

    def _along(self, direction: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return v·gᵢ of one batch, [b].

        Forward mode would take 0.5 to 0.7 of the time, but it passes through what a network keeps
        from backward mode (torch.no_grad, .detach()), and so belongs to another gradient.
        """
        if not self._plain:
            try:
                with torch.enable_grad():
                    losses, _ = self.classifier.losses(inputs, labels)
                    weights = torch.ones_like(losses, requires_grad=True)
                    total = flatten(self.classifier.gradient(losses, weights))
                    check_not_severed(total)
                    return torch.autograd.grad(total @ direction, weights)[0]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a layer without second derivative
                self._go_plainly(str(error))
        return torch.stack(
            [self._one(*pair) @ direction for pair in zip(inputs, labels, strict=True)]
        )

    def all(self) -> Tensor:
        """Return G, [n, P]."""
        return self.fill(self.theta.new_empty(len(self), len(self.theta)), 0)

    def fill(self, rows: Tensor, first: int) -> Tensor:
        """Write the gradients of samples first, first + 1, … into `rows` [b, P] and return it."""
        for start in range(0, len(rows), self.batch_size):
            stop = min(start + self.batch_size, len(rows))
            part = slice(first + start, first + stop)
            rows[start:stop] = self._each(self.inputs[part], self.labels[part])
        return rows

    def _each(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the gradients of one batch, [b, P]; the first time beside a backward pass."""
        if self._plain:
            return torch.stack([self._one(*pair) for pair in zip(inputs, labels, strict=True)])
        each = vmap(grad(lambda t, x, y: self._losses(t, x[None], y[None])[0]), (None, 0, 0))
        theta = {name: value.detach() for name, value in self.classifier.theta.items()}
        try:
            with torch.no_grad():
                found = [
                    value.reshape(len(inputs), -1) for value in each(theta, inputs, labels).values()
                ]
                rows = torch.cat(found, dim=1)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._go_plainly(str(error))
            return self._each(inputs, labels)
        if not self._compared:
            self._compared = True
            expected = self._one(inputs[0], labels[0])
            apart = (rows[0] - expected).abs().max()
            if apart > 0.01 * expected.abs().max():
                self._go_plainly("its gradient differs from that of a backward pass")
                return self._each(inputs, labels)
        return rows

    def _one(self, inputs: Tensor, label: Tensor) -> Tensor:
        """Return the gradient of one sample, [P], by a backward pass of its own."""
        with torch.enable_grad():
            losses, _ = self.classifier.losses(inputs[None], label[None])
            one = torch.ones_like(losses)
            return flatten(self.classifier.gradient(losses, one, differentiable=False))

    def _go_plainly(self, reason: str) -> None:
        self._plain = True
        warnings.warn(
            f"model: its gradients are computed sample by sample, slower but right, since PyTorch "
            f"cannot take them batch by batch ({' '.join(reason.split())[:200]})",
            stacklevel=4,
        )

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
        needed = GRAM_GIGABYTES * count**2
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
        logits = read_logits(self.classifier.model, theta, inputs).to(self.theta.dtype)
        return self.classifier.loss_fn(logits, labels.clone())

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
