"""Dataset distillation by matching, from the real images that may be seen.

Per class c, with real images T_c, synthetic ones S_c and an augmentation A_c that both share:

    DC, DSA   Σ_c Σ_rows 1 − cos(∇_θ L(A_c(T_c)), ∇_θ L(A_c(S_c)))    arXiv 2006.05929, 2102.08259
    DM        Σ_c ‖mean ψ_θ(A_c(T_c)) − mean ψ_θ(A_c(S_c))‖²           arXiv 2110.04181
    PDD       DM + w·L_kkt(S, Λ) of one trained classifier             arXiv 2405.00348

DC and DSA match gradients of networks that start fresh and learn from S between the steps; DM
matches the features ψ of a fresh random network at every step.

Shapes: K classes, m synthetic and b real images each; batches are grouped by class, [K, b, C, H, W]
and [K, m, C, H, W]; gradients [K, *parameter]; features [K, b, d].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dsvlib._progress import progress_bar
from dsvlib._validation import (
    as_labels,
    check_bounds,
    check_choice,
    check_count,
    check_inputs,
    check_number,
)
from dsvlib.augmentation import DSA, AugmentationConfig, Draw, apply, draw
from dsvlib.classifiers.architectures import build_model, embed
from dsvlib.classifiers.training import Labelled, TrainConfig, train
from dsvlib.conditions import Conditions, residuals
from dsvlib.data.datasets import Split
from dsvlib.distance import DISTANCES, Distance
from dsvlib.frozen import evaluation_mode
from dsvlib.second_order import cheap_double_backward
from dsvlib.solution import Solution, Status
from dsvlib.support_set import SupportSet


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """What both ways of matching have in common.

    steps
        Random networks to match on, one after the other.
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
        What `build_model` makes; depth 3 and width 128 unless said otherwise.
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
        check_number("momentum", self.momentum, at_least=0)
        for name in ("steps", "batch_real", "log_every"):
            check_count(name, getattr(self, name))
        if self.shot is not None:
            check_count("shot", self.shot)


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


@dataclass(frozen=True, kw_only=True)
class DistributionMatchingConfig(MatchingConfig):
    """DM's settings, and those of the DeepKKT loss that a classifier adds.

    deepkkt_weight
        w, of L_kkt = D(θ, −Σλ∇L) + β1·L_primal on the synthetic images as they are. With D the
        cosine and rate 1, 1 is safe; at 100 the images run away.
    distance, primal_weight
        D and β1.
    multiplier_learning_rate, initial_multiplier
        Adam's rate and the start for λ, which is clamped at 0; rate 0 keeps it fixed.
    """

    steps: int = 20_000
    learning_rate: float = 1.0
    init: Literal["noise", "real"] = "real"
    augmentation: AugmentationConfig | None = DSA
    deepkkt_weight: float = 1.0
    distance: Distance = "cosine"
    primal_weight: float = 1.0
    multiplier_learning_rate: float = 0.01
    initial_multiplier: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("distance", self.distance, DISTANCES)
        check_number("initial_multiplier", self.initial_multiplier, above=0)
        for name in ("deepkkt_weight", "primal_weight", "multiplier_learning_rate"):
            check_number(name, getattr(self, name), at_least=0)


def match_gradients(
    split: Labelled,
    *,
    per_class: int,
    config: GradientMatchingConfig | None = None,
    bounds: tuple[Tensor, Tensor] | tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """Make `per_class` images per class by gradient matching (DC, Alg. 1; DSA with augmentation).

    Parameters
    ----------
    split
        Real images; only `config.shot` of them per class are looked at, drawn first of all from
        `generator` as `seen_images` does, so that one seed shows every method the same images.
        The work is done on their device and in their dtype.
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
    run = _Run(split, per_class, config, bounds, generator)
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


def match_distributions(
    split: Labelled,
    *,
    per_class: int,
    config: DistributionMatchingConfig | None = None,
    classifier: nn.Module | None = None,
    bounds: tuple[Tensor, Tensor] | tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """Make `per_class` images per class by matching mean features (DM; with a classifier, PDD).

    Parameters
    ----------
    split, bounds, generator
        As in `match_gradients`.
    classifier
        A trained network whose DeepKKT loss on the synthetic images is added, with multipliers λ
        of its own; read in evaluation mode and left as it was.

    Raises ValueError as `match_gradients` does, and for labels the classifier cannot have.
    `residuals` are those of the classifier, or None without one.
    """
    config = config or DistributionMatchingConfig()
    run = _Run(split, per_class, config, bounds, generator)
    conditions = None if classifier is None else Conditions(classifier)

    def losses() -> Iterator[dict[str, Tensor]]:
        for _ in range(config.steps):
            network = run.fresh_network().requires_grad_(False)
            real, synthetic = run.batches()
            with torch.no_grad():
                target = _features(network, real)
            terms = {"matching": feature_distance(target, _features(network, synthetic))}
            if conditions is not None:
                kkt = conditions.terms(run.x, run.labels, run.multipliers, config.distance)
                terms |= {"stationarity": kkt.stationarity, "primal": kkt.primal}
            yield terms

    if classifier is None:
        status, history = run.descend(losses(), config.steps)
        return Solution(run.samples(), status, history, None, config)
    run.learn_multipliers(config.initial_multiplier, config.multiplier_learning_rate)
    weights = {
        "stationarity": config.deepkkt_weight,
        "primal": config.deepkkt_weight * config.primal_weight,
    }
    with evaluation_mode(classifier):
        status, history = run.descend(losses(), config.steps, weights)
    return Solution(run.samples(), status, history, residuals(classifier, run.samples()), config)


def seen_images(split: Labelled, shot: int | None, *, generator: torch.Generator) -> Split:
    """Draw the `shot` real images per class that a method may see, ordered by class.

    `match_gradients` and `match_distributions` draw exactly these from a generator in the same
    state, and a real start takes the first ones of each class. Draws are nested: 10 shots hold the
    image of 1 shot. None: all images, nothing is drawn.

    Raises ValueError where a class between 0 and the highest label has none or fewer than `shot`.
    """
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


def feature_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return Σ_c ‖mean first_c − mean second_c‖² (DM, Eq. 4), a scalar.

    Features [K, b, d] and [K, m, d].
    """
    return (first.mean(dim=1) - second.mean(dim=1)).square().sum()


def _features(network: nn.Module, images: Tensor) -> Tensor:
    """Return ψ of all classes from one forward pass, [K, b, d]."""
    return embed(network, images.flatten(0, 1)).unflatten(0, images.shape[:2])


def _real_gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the gradient of the mean loss of each class, one tensor [K, *parameter] each.

    One class after the other: with many images, a batched pass takes up to three times as long.
    """
    parameters = list(network.parameters())
    gradients = [
        torch.autograd.grad(
            F.cross_entropy(network(own), own.new_full((len(own),), number, dtype=torch.int64)),
            parameters,
        )
        for number, own in enumerate(images)
    ]
    return [torch.stack(parts) for parts in zip(*gradients, strict=True)]


def _gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the same as `_real_gradients`, differentiable in `images`.

    All classes in one batched pass: with few images it takes 0.3 to 0.9 times as long as a loop.
    """
    labels = torch.arange(len(images), device=images.device)
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], own: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, (own,)), label.expand(len(own)))

    with cheap_double_backward():  # attention cannot be differentiated twice without it
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
            network(images)


class _Run:
    """State of one run: the images seen, the synthetic ones, and λ where there is a classifier."""

    def __init__(
        self,
        split: Labelled,
        per_class: int,
        config: MatchingConfig,
        bounds: tuple[Tensor, Tensor] | tuple[float, float] | None,
        generator: torch.Generator | None,
    ) -> None:
        check_count("per_class", per_class)
        self.config = config
        self.generator = generator or torch.Generator().manual_seed(0)
        self.real = seen_images(split, config.shot, generator=self.generator).inputs
        if self.real.ndim != 4:
            raise ValueError(
                f"inputs: expected images [n, C, H, W], got shape {list(self.real.shape)}; "
                f"matching needs a network that build_model can make"
            )
        self.counts = as_labels(split.labels).bincount().tolist()
        if config.shot is not None:
            self.counts = [config.shot] * len(self.counts)
        channels, height, width = self.real.shape[1:]
        self.shape = (channels, height, width)
        self.limits = check_bounds(bounds, self.shape, self.real)
        classes = torch.arange(len(self.counts), device=self.real.device)
        self.labels = classes.repeat_interleave(per_class)
        self.x = self._start(per_class).requires_grad_()
        self.multipliers = self.real.new_ones(len(self.labels))
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.SGD([self.x], config.learning_rate, momentum=config.momentum)
        ]

    def learn_multipliers(self, initial: float, learning_rate: float) -> None:
        """Make λ a variable of the run."""
        self.multipliers = torch.full_like(self.multipliers, initial).requires_grad_()
        self.optimizers.append(torch.optim.Adam([self.multipliers], learning_rate))

    def samples(self) -> SupportSet:
        """Return the synthetic set as it is now."""
        return SupportSet(self.x.detach().clone(), self.labels, self.multipliers.detach().clone())

    def _start(self, per_class: int) -> Tensor:
        if self.config.init == "noise":
            size = (len(self.counts) * per_class, *self.shape)
            start = torch.randn(size, generator=self.generator).to(self.real)
        else:
            if min(self.counts) < per_class:
                raise ValueError(
                    f"per_class: expected at most {min(self.counts)} for a real start, the images "
                    f"seen of a class, got {per_class}; raise shot or use init='noise'"
                )
            own = self.real.split(self.counts)
            start = torch.cat([images[:per_class] for images in own]).clone()
        return start if self.limits is None else start.clamp(*self.limits)

    def fresh_network(self) -> nn.Module:
        """Return a network with random weights that only the generator decides."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        with torch.random.fork_rng(devices=[]):  # made on the CPU
            torch.default_generator.manual_seed(seed)
            network = build_model(
                self.config.network,
                num_classes=len(self.counts),
                shape=self.shape,
                **self.config.network_options,
            )
        return network.to(self.real)

    def batches(self) -> tuple[Tensor, Tensor]:
        """Return real [K, b, C, H, W] and synthetic [K, m, C, H, W] images under one draw."""
        size = min(self.config.batch_real, *self.counts)
        first, index = 0, []
        for count in self.counts:  # the images seen lie ordered by class
            index.append(first + torch.randperm(count, generator=self.generator)[:size])
            first += count
        real = self.real[torch.cat(index).to(self.real.device)]
        synthetic: Tensor = self.x
        classes = len(self.counts)
        if self.config.augmentation is not None:
            numbers = draw(
                self.config.augmentation,
                classes,
                self.shape,
                generator=self.generator,
                device=real.device,
                dtype=real.dtype,
            )
            real, synthetic = (apply(x, _repeat(numbers, len(x))) for x in (real, synthetic))
        return real.unflatten(0, (classes, -1)), synthetic.unflatten(0, (classes, -1))

    def descend(
        self,
        losses: Iterator[dict[str, Tensor]],
        steps: int,
        weights: Mapping[str, float] | None = None,
    ) -> tuple[Status, pd.DataFrame]:
        """Take `steps` steps down the weighted sum of the terms that `losses` yields."""
        variables = [group["params"][0] for o in self.optimizers for group in o.param_groups]
        rows: list[dict[str, float]] = []
        good = [variable.detach().clone() for variable in variables]
        status = Status.ALL_STEPS
        for number in progress_bar(range(1, steps + 1), "distillation"):
            try:
                terms = next(losses)
            except FloatingPointError:  # the network diverged on these images
                status = Status.NON_FINITE
                break
            total = torch.stack([(weights or {}).get(k, 1.0) * v for k, v in terms.items()]).sum()
            gradients = torch.autograd.grad(total, variables, materialize_grads=True)
            if not _all_finite(total, *gradients):
                status = Status.NON_FINITE
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
                status = Status.NON_FINITE
                break
        if status is Status.NON_FINITE:
            with torch.no_grad():
                for variable, last in zip(variables, good, strict=True):
                    variable.copy_(last)
        return status, pd.DataFrame(rows)


def _all_finite(*tensors: Tensor) -> bool:
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _repeat(numbers: Draw, count: int) -> Draw:
    """Return a draw with one row per class as one with a row for each of `count` images."""
    repeated: dict[str, Any] = {
        name: value.repeat_interleave(count // len(value), dim=0)
        for name, value in numbers._asdict().items()
        if isinstance(value, Tensor)
    }
    return numbers._replace(**repeated)
