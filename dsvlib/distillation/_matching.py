"""What both ways of matching share: the images seen, the synthetic ones, and steps down a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from dsvlib._progress import progress_bar
from dsvlib._validation import (
    as_generator,
    as_labels,
    check_bounds,
    check_choice,
    check_count,
    check_gradients_on,
    check_inputs,
    check_number,
)
from dsvlib.augmentation import AugmentationConfig, Draw, apply, draw
from dsvlib.classifiers.architectures import build_model
from dsvlib.data.datasets import AnySplit, Split, as_split
from dsvlib.frozen import evaluation_mode, read_logits
from dsvlib.solution import Solution, Status
from dsvlib.support_set import SupportSet

Bounds = tuple[Tensor, Tensor] | tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """What both ways of matching have in common.

    steps
        Fresh networks to match on, one after the other.
    learning_rate, momentum
        Of SGD on the synthetic images.
    init
        Start from ``"noise"``, N(0, I), or from the ``"real"`` images seen.
    batch_real
        Real images per class and step, drawn anew from those seen (all, if there are fewer).
    augmentation
        Siamese: one draw per class and step, shared by its real and synthetic images. Which of
        DSA's transformations is used is drawn once per step. None for none.
    shot
        Real images per class that may be seen; None for all.
    network, network_options
        What `dsvlib.build_model` makes, where no networks of one's own are passed.
    log_every
        Steps of the images between rows of the history.
    """

    steps: int = 1000
    learning_rate: float = 0.1
    momentum: float = 0.5
    init: Literal["noise", "real"] = "noise"
    batch_real: int = 256
    augmentation: AugmentationConfig | None = None
    shot: int | None = None
    network: str = "convnet"
    network_options: Mapping[str, Any] = field(default_factory=dict)
    log_every: int = 20

    def __post_init__(self) -> None:
        check_choice("init", self.init, ("noise", "real"))
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("momentum", self.momentum, at_least=0, below=1)
        for name in ("steps", "batch_real", "log_every"):
            check_count(name, getattr(self, name))
        if self.shot is not None:
            check_count("shot", self.shot)


def seen_images(split: AnySplit, shot: int | None, *, generator: torch.Generator) -> Split:
    """Draw the `shot` real images per class that a method may see, ordered by class.

    `match_gradients` and `match_distributions` draw exactly these from a generator in the same
    state, and a real start takes the first ones of each class. Draws are nested: 10 shots hold the
    image of 1 shot. None: all images, nothing is drawn.

    Raises ValueError where a class between 0 and the highest label has none or fewer than `shot`.
    """
    generator, split = as_generator(generator), as_split(split)
    labels = as_labels(split.labels)
    if labels.is_floating_point():
        raise ValueError(
            f"labels: expected class numbers, int64 [n], got soft labels {list(labels.shape)}; "
            f"pass split.labels.argmax(dim=1)"
        )
    if shot is not None:
        check_count("shot", shot)
    chosen = []
    for number in range(int(labels.max()) + 1):
        members = (labels == number).nonzero()[:, 0].cpu()
        if len(members) < (shot or 1):
            raise ValueError(
                f"class {number}: expected at least {shot or 1} real images, got {len(members)}; "
                f"lower shot, or add images of this class"
            )
        if shot is not None:
            members = members[torch.randperm(len(members), generator=generator)[:shot]]
        chosen.append(members)
    index = torch.cat(chosen).to(split.inputs.device)
    return Split(check_inputs(split.inputs[index]), labels[index])


class Matching:
    """State of one run: the images seen, the synthetic ones, and λ where there is a classifier."""

    def __init__(
        self,
        split: AnySplit,
        per_class: int,
        config: MatchingConfig,
        bounds: Bounds | None,
        generator: torch.Generator | None,
        build: Callable[[], nn.Module] | None = None,
    ) -> None:
        check_gradients_on()
        check_count("per_class", per_class)
        self.config = config
        self.generator = as_generator(generator)
        seen = seen_images(split, config.shot, generator=self.generator)
        if seen.inputs.ndim != 4:
            raise ValueError(
                f"inputs: expected images [n, C, H, W], got shape {list(seen.inputs.shape)}; "
                f"matching needs a network that build_model can make"
            )
        channels, height, width = seen.inputs.shape[1:]
        self.shape = (channels, height, width)
        self.real = seen.inputs.split(seen.labels.bincount().tolist())  # of each class
        self.smallest = min(map(len, self.real))
        self.limits = check_bounds(bounds, self.shape, seen.inputs)
        self.labels = seen.labels.unique().repeat_interleave(per_class)
        if config.init == "noise":
            size = (len(self.labels), *self.shape)
            start = torch.randn(size, generator=self.generator).to(seen.inputs)
        elif self.smallest < per_class:
            raise ValueError(
                f"per_class: expected at most {self.smallest} for a real start, the images seen of "
                f"a class, got {per_class}; raise shot or use init='noise'"
            )
        else:
            start = torch.cat([images[:per_class] for images in self.real])
        self.x = start if self.limits is None else start.clamp(*self.limits)
        self.x.requires_grad_()
        self.multipliers = seen.inputs.new_ones(len(self.labels))
        self.build = build or self._named_network
        if build is not None:
            self._try_one()
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.SGD([self.x], config.learning_rate, momentum=config.momentum)
        ]

    def _named_network(self) -> nn.Module:
        config = self.config
        classes, options = len(self.real), config.network_options
        return build_model(config.network, num_classes=classes, shape=self.shape, **options)

    def _try_one(self) -> None:
        """Raise where one's own network cannot read the images, or has too few logits."""
        with torch.random.fork_rng(devices=[]):
            network = self.build().to(self.x)
        with evaluation_mode(network), torch.no_grad():
            outputs = read_logits(network, {}, self.x[:1]).shape[1]
        if outputs < len(self.real):
            raise ValueError(
                f"build_model: expected networks with a logit for each of {len(self.real)} "
                f"classes, got {outputs}; make their last layer wider"
            )

    def learn_multipliers(self, initial: float, learning_rate: float) -> None:
        """Make λ a variable of the run."""
        self.multipliers = torch.full_like(self.multipliers, initial).requires_grad_()
        self.optimizers.append(torch.optim.Adam([self.multipliers], learning_rate))

    def samples(self) -> SupportSet:
        """Return the synthetic set as it is now."""
        return SupportSet(self.x.detach().clone(), self.labels, self.multipliers.detach().clone())

    def fresh_network(self) -> nn.Module:
        """Return a network with random weights that only the generator decides."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        with torch.random.fork_rng(devices=[]):  # made on the CPU
            torch.default_generator.manual_seed(seed)
            return self.build().to(self.x)

    def batches(self) -> tuple[Tensor, Tensor]:
        """Return real [K, b, C, H, W] and synthetic [K, m, C, H, W] images under one draw."""
        size = min(self.config.batch_real, self.smallest)
        orders = [torch.randperm(len(own), generator=self.generator)[:size] for own in self.real]
        real = torch.cat([own[order] for own, order in zip(self.real, orders, strict=True)])
        synthetic: Tensor = self.x
        if self.config.augmentation is not None:
            numbers = draw(
                self.config.augmentation,
                len(self.real),
                self.shape,
                generator=self.generator,
                device=real.device,
                dtype=real.dtype,
            )
            real, synthetic = (apply(x, _repeat(numbers, len(x))) for x in (real, synthetic))
        classes = len(self.real)
        return real.unflatten(0, (classes, -1)), synthetic.unflatten(0, (classes, -1))

    def descend(
        self,
        losses: Iterator[dict[str, Tensor]],
        steps: int,
        weights: Mapping[str, float] | None = None,
    ) -> Solution:
        """Take `steps` steps down the weighted sum of the terms that `losses` yields."""
        variables = [group["params"][0] for o in self.optimizers for group in o.param_groups]
        rows: list[dict[str, float]] = []
        good = [variable.detach().clone() for variable in variables]
        for number in progress_bar(range(1, steps + 1), "distillation"):
            try:
                terms = next(losses)
            except FloatingPointError:  # the network diverged on these images
                break
            total = torch.stack([(weights or {}).get(k, 1.0) * v for k, v in terms.items()]).sum()
            gradients = torch.autograd.grad(total, variables, materialize_grads=True)
            if not _all_finite(total, *gradients):
                break
            if number % self.config.log_every == 0 or number in (1, steps):
                values = {"total": total} | terms
                rows.append({"step": number} | {k: float(v.detach()) for k, v in values.items()})
            good = [variable.detach().clone() for variable in variables]
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.grad = gradient
            for optimizer in self.optimizers:
                optimizer.step()
            with torch.no_grad():
                if self.limits is not None:
                    self.x.clamp_(*self.limits)
                if self.multipliers.requires_grad:
                    self.multipliers.clamp_(min=0)
            if not _all_finite(*variables):
                break
        else:
            return self._solution(Status.ALL_STEPS, rows)
        with torch.no_grad():
            for variable, last in zip(variables, good, strict=True):
                variable.copy_(last)
        return self._solution(Status.NON_FINITE, rows)

    def _solution(self, status: Status, rows: list[dict[str, float]]) -> Solution:
        return Solution(self.samples(), status, pd.DataFrame(rows), None, self.config)


def in_parts(network: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Return images [n, C, H, W] in parts whose activations a CPU's allocator keeps and reuses.

    On other devices, and for batch norms that read their batch, all are one part.
    """
    norms = (m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    together = any(m.training or not m.track_running_stats for m in norms)
    height, width = images.shape[2:]
    pixels = 32768 if torch.is_grad_enabled() else 16384
    few = len(images) if together or images.device.type != "cpu" else pixels // (height * width)
    return images.split(max(1, few))


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _repeat(numbers: Draw, count: int) -> Draw:
    """Return a draw with one row per class as one with a row for each of `count` images."""
    parts = numbers._asdict().items()
    rows: dict[str, Any] = {
        k: v.repeat_interleave(count // len(v), 0) for k, v in parts if isinstance(v, Tensor)
    }
    return numbers._replace(**rows)
