"""Distillation by gradient matching: DC and, with augmentation, DSA.

    Σ_c Σ_rows 1 − cos(∇_θ L(A_c(T_c)), ∇_θ L(A_c(S_c)))    arXiv 2006.05929, 2102.08259

over networks that start fresh and learn from S between the steps. Shapes: K classes, m synthetic
and b real images each, [K, m, C, H, W] and [K, b, C, H, W]; gradients [K, *parameter].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from dsvlib._second_derivatives import check_not_severed, explain_failure
from dsvlib._validation import check_count, check_number
from dsvlib.augmentation import DSA
from dsvlib.classifiers.training import TrainConfig, train
from dsvlib.data.datasets import AnySplit
from dsvlib.distillation._matching import Bounds, Matching, MatchingConfig, in_parts
from dsvlib.frozen import evaluation_mode, read_logits
from dsvlib.gradients import flatten
from dsvlib.solution import Solution


@dataclass(frozen=True, kw_only=True)
class GradientMatchingConfig(MatchingConfig):
    """DC's settings; `GradientMatchingConfig.dsa()` gives DSA's.

    loops
        (outer, inner): steps of the images per network, and epochs that the network learns from
        them between two such steps. Default: the paper's, (1, 1) for one image per class, (10, 50)
        for 10, (50, 10) for 50 and (m, 500 // m) for others.
    network_learning_rate
        Of plain SGD on the network in those epochs.
    """

    loops: tuple[int, int] | None = None
    network_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("network_learning_rate", self.network_learning_rate, above=0)
        if self.loops is not None and len(self.loops) != 2:
            raise ValueError(
                f"loops: expected two counts, (outer, inner), got {self.loops!r}; "
                f"None takes the paper's"
            )
        for loop in self.loops or ():
            check_count("loops", loop)

    @classmethod
    def dsa(cls, **changes: Any) -> GradientMatchingConfig:
        """Return DSA's settings: real start, siamese augmentation; `changes` replace others."""
        settings: dict[str, Any] = {"init": "real", "augmentation": DSA}
        return cls(**settings | changes)

    def loops_for(self, per_class: int) -> tuple[int, int]:
        """Return (outer, inner) for `per_class` images."""
        if self.loops is not None:
            return self.loops
        return (1, 1) if per_class == 1 else (per_class, max(1, 500 // per_class))


@torch.enable_grad()
def match_gradients(
    split: AnySplit,
    *,
    per_class: int,
    config: GradientMatchingConfig | None = None,
    build_model: Callable[[], nn.Module] | None = None,
    bounds: Bounds | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """Make `per_class` images per class by gradient matching (DC, Alg. 1; DSA with augmentation).

    Parameters
    ----------
    split
        Real images; only `config.shot` of them per class are looked at, drawn first of all from
        `generator` as `seen_images` does, so that one seed shows every method the same images.
        The work is done on their device and in their dtype.
    build_model
        Makes a fresh network of one's own, as in `evaluate`; called with torch's global generator
        seeded and afterwards restored; it reads each image by itself, batch norms aside. Default:
        what the config names.
    bounds
        Lowest and highest valid value, numbers or one per channel [C]; images are kept inside.
        Default: none, as in the papers.
    generator
        CPU generator for everything random; default: a fresh one with seed 0.

    Networks that `torch.func` cannot transform are differentiated class by class, with a warning.
    Raises ValueError where a class has no images, fewer than `shot`, or fewer than a real start
    needs, and for networks without second derivatives.

    A run that becomes non-finite ends with status `NON_FINITE` and the last finite images.
    `residuals` is None: no trained classifier is involved.
    """
    config = config or GradientMatchingConfig()
    run = Matching(split, per_class, config, bounds, generator, build_model)
    outer, inner = config.loops_for(per_class)
    gradients = _ClassGradients()
    learning = TrainConfig(
        epochs=inner,
        batch_size=256,
        learning_rate=config.network_learning_rate,
        momentum=0.0,
        weight_decay=0.0,
        schedule="constant",
        augmentation=config.augmentation,
        log_every=inner,
    )

    def losses() -> Iterator[dict[str, Tensor]]:
        for _ in range(config.steps):
            network = run.fresh_network()
            for step in range(outer):
                if step:
                    train(network, run.samples(), config=learning, generator=run.generator)
                real, synthetic = run.batches()
                if not step:
                    _read_statistics(network, real.flatten(0, 1))
                with evaluation_mode(network):
                    target = gradients.real(network, real)
                    found = gradients.synthetic(network, synthetic)
                    yield {"matching": gradient_distance(target, found)}

    return run.descend(losses(), config.steps * outer)


def gradient_distance(first: Iterable[Tensor], second: Iterable[Tensor]) -> Tensor:
    """Return Σ over classes, weight tensors and output rows of 1 − cos (DC, Eq. 10), a scalar.

    Each tensor is the gradient of one parameter for every class, [K, *parameter]. Biases and
    parameters of normalisations have one dimension and are left out.
    """
    rows = [
        1 - F.cosine_similarity(a.flatten(2), b.flatten(2), dim=2)  # [K, rows]
        for a, b in zip(first, second, strict=True)
        if a.ndim > 2
    ]
    return torch.cat(rows, dim=1).sum()


class _ClassGradients:
    """∇_θ of the mean loss of each class, one tensor [K, *parameter] each, for networks of a kind.

    On few pixels a batched pass over all classes takes 0.3 to 0.9 times as long as one class after
    the other; on many, up to three times as long. The first batched pass is held against the loop:
    where PyTorch cannot take it, or finds something else, the loop serves from then on.
    """

    def __init__(self) -> None:
        self._checked = self._looped = False

    def real(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """Return the gradients of many images [K, b, C, H, W], as constants."""
        return [value.detach() for value in _looped(network, images)]

    def synthetic(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """Return the gradients of few images [K, m, C, H, W], differentiable in them.

        Raises ValueError for a network without second derivatives, naming the layer.
        """
        if not self._checked:
            self._checked = True
            self._looped = len(in_parts(network, images.flatten(0, 1))) > 1
            self._compare(network, images)
        return _looped(network, images) if self._looped else _batched(network, images)

    def _compare(self, network: nn.Module, images: Tensor) -> None:
        expected = _looped(network, images)
        try:
            total = torch.stack([value.square().sum() for value in expected]).sum()
            check_not_severed(total)
            torch.autograd.grad(total, images, materialize_grads=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            seen = images.detach().flatten(0, 1)
            raise ValueError(explain_failure(network, seen, error)) from error
        if self._looped:
            return
        try:
            found = _batched(network, images)
            have, want = (flatten(values).detach() for values in (found, expected))
            apart = (have - want).abs().max()
            alike = bool(apart <= 0.01 * want.abs().max())
            reason = None if alike else "they differ from those of a backward pass"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # networks of one's own that torch.func cannot transform
            reason = " ".join(str(error).split())[:200]
        if reason is not None:
            self._looped = True
            warnings.warn(
                f"build_model: gradients are computed class by class, slower but right, since "
                f"PyTorch cannot take them in one pass ({reason})",
                stacklevel=2,
            )


def _looped(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the gradients of each class, one class after the other."""
    gradients = [_gradient(network, own, label) for label, own in enumerate(images)]
    return [torch.stack(parts) for parts in zip(*gradients, strict=True)]


def _gradient(network: nn.Module, images: Tensor, label: int) -> list[Tensor]:
    """Return the gradient of one class, [*parameter] each."""
    parameters = [value for value in network.parameters() if value.requires_grad]
    gradient: list[Tensor] = []
    for part in in_parts(network, images):
        loss = F.cross_entropy(
            read_logits(network, {}, part),
            torch.full((len(part),), label, device=part.device),
            reduction="sum",
        )
        found = torch.autograd.grad(
            loss / len(images),
            parameters,
            create_graph=images.requires_grad,
            materialize_grads=True,
        )
        gradient = list(map(torch.add, gradient, found)) if gradient else list(found)
    return gradient


def _batched(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the same from one pass."""
    labels = torch.arange(len(images), device=images.device)
    named = network.named_parameters()
    parameters = {name: value.detach() for name, value in named if value.requires_grad}

    def loss(parameters: dict[str, Tensor], own: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(read_logits(network, parameters, own), label.expand(len(own)))

    return list(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels).values())


def _read_statistics(network: nn.Module, images: Tensor) -> None:
    """Set the running statistics of batch norms, if any, to those of `images`.

    DC does this because the statistics of a handful of images of one class say nothing.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        for module in norms:
            module.momentum = None  # the plain average over passes, of which this is the first
        with torch.no_grad():
            network(images.clone())  # it may write into them
