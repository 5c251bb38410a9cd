"""Distillation by gradient matching: DC and, with augmentation, DSA.

    Σ_c Σ_rows 1 − cos(∇_θ L(A_c(T_c)), ∇_θ L(A_c(S_c)))    arXiv 2006.05929, 2102.08259

over networks that start fresh and learn from S between the steps. Shapes: K classes, m synthetic
and b real images each, [K, m, C, H, W] and [K, b, C, H, W]; gradients [K, *parameter].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from dsvlib._validation import check_count, check_number
from dsvlib.augmentation import DSA
from dsvlib.classifiers.training import TrainConfig, train
from dsvlib.data.datasets import AnySplit
from dsvlib.distillation._matching import Bounds, Matching, MatchingConfig
from dsvlib.frozen import evaluation_mode, read_logits
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
        seeded and afterwards restored. Default: what the config names.
    bounds
        Lowest and highest valid value, numbers or one per channel [C]; images are kept inside.
        Default: none, as in the papers.
    generator
        CPU generator for everything random; default: a fresh one with seed 0.

    Raises ValueError where a class has no images, fewer than `shot`, or fewer than a real start
    needs. A run that becomes non-finite ends with status `NON_FINITE` and the last finite images.
    `residuals` is None: no trained classifier is involved.
    """
    config = config or GradientMatchingConfig()
    run = Matching(split, per_class, config, bounds, generator, build_model)
    outer, inner = config.loops_for(per_class)
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
                    target = _real_gradients(network, real)
                    yield {"matching": gradient_distance(target, _gradients(network, synthetic))}

    status, history = run.descend(losses(), config.steps * outer)
    return Solution(run.samples(), status, history, None, config)


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


def _real_gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the gradient of the mean loss of each class, one tensor [K, *parameter] each.

    One class after the other: with many images, a batched pass takes up to three times as long.
    Differentiable in `images` where they require grad.
    """
    parameters = list(network.parameters())
    labels = torch.arange(len(images), device=images.device)
    gradients = [
        torch.autograd.grad(
            F.cross_entropy(read_logits(network, {}, own), label.expand(len(own))),
            parameters,
            create_graph=images.requires_grad,
            materialize_grads=True,
        )
        for own, label in zip(images, labels, strict=True)
    ]
    return [torch.stack(parts) for parts in zip(*gradients, strict=True)]


def _gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the same as `_real_gradients`, differentiable in `images`.

    All classes in one batched pass: with few images it takes 0.3 to 0.9 times as long as a loop.
    """
    labels = torch.arange(len(images), device=images.device)
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], own: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(read_logits(network, parameters, own), label.expand(len(own)))

    try:
        return list(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels).values())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # networks of one's own that torch.func cannot transform
        return _real_gradients(network, images)


def _read_statistics(network: nn.Module, images: Tensor) -> None:
    """Set the running statistics of batch norms, if any, to those of `images`.

    DC does this because the statistics of a handful of images of one class say nothing.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        for module in norms:
            module.momentum = None  # the plain average over passes, of which this is the first
        with torch.no_grad():
            network(images)
