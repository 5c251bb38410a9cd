"""Synthesis of deep support vectors: DSV Algorithm 1.

    L_total(X, Λ) = L_kkt(X, Λ) + η·L_kkt(A(X), Λ) + β2·L_tv(X) + β3·L_norm(X)
    L_kkt(X, Λ)   = α·D(θ, −Σᵢ λᵢ ∇_θ Lᵢ) + β1·L_primal(X)

Gradient steps on X and Λ, λ ≥ 0 kept by clamping or removal, A drawn afresh each step. Each L_kkt
costs one forward and two backward passes, whatever the number of samples.

Shapes: X [n, C, H, W], Λ [n], labels int64 [n] or float [n, K].
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvlib._progress import progress_bar
from dsvlib._resume import Checkpoint, State
from dsvlib._schedule import learning_rate_factor
from dsvlib._second_derivatives import check_not_severed, explain_failure
from dsvlib._validation import (
    as_labels,
    check_bounds,
    check_choice,
    check_count,
    check_inputs,
    check_number,
)
from dsvlib.augmentation import AugmentationConfig, apply, draw
from dsvlib.conditions import (
    DISTANCES,
    Conditions,
    Distance,
    Terms,
    best_scale,
    image_variation,
    primal_loss,
    residuals,
    squared_norm,
)
from dsvlib.frozen import evaluation_mode
from dsvlib.logits import entropy, is_feasible
from dsvlib.solution import Solution, Status
from dsvlib.support_set import SupportSet

BLACK = -0.957  # (0 − mean) / std of the bundled digits: the colour of their background


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """Every choice of Algorithm 1; the defaults give good DSVs of the shipped digits classifier.

    They were chosen on judges that saw a part of the training images only. Half the resolution
    and a pull to black suit strokes on a dark ground; start from `photographs()` for other images.

    steps, learning_rate, betas, schedule
        Adam steps on X over all resolutions, with a ``"cosine"`` or ``"constant"`` schedule.
    multiplier_learning_rate, initial_multiplier
        Adam's rate and the start for Λ; rate 0 keeps λ fixed.
    negative_multiplier
        ``"clamp"`` λ to `minimum_multiplier`, or ``"remove"`` the sample as the paper does.
    minimum_multiplier
        Floor under λ while clamping. At 0 a sample may drop out for good: where λ = 0 the
        stationarity term no longer moves it. The scale set at the end is applied after the floor.
    distance
        D: ``"cosine"`` (blind to the scale of Λ, which is set at the end to the best one),
        ``"l1"`` or ``"l2"``.
    reduction
        Whether λᵢ weighs L as a ``"sum"`` (the stationarity equation) or a ``"mean"`` over n.
    stationarity_weight, primal_weight, augmented_weight, tv_weight, norm_weight
        α, β1, η, β2, β3. Total variation and squared norm are taken per pixel, averaged over
        samples, so that a weight means the same at every size. α = 0 leaves out stationarity.
    norm_target
        Value in normalised units that the norm prior pulls to: 0 is the mean colour.
    augmentation
        A, drawn afresh at every step for every sample.
    resolutions
        Resolutions to optimise at, one after the other, as fractions of the full image side, e.g.
        ``(0.25, 0.5, 1.0)``; the steps are shared equally. X is up-sampled to the model's size
        before it is read. Empty: full size only.
    growing_jitter
        Shift by `augmentation.translate` at the largest of the resolutions only, and at smaller
        ones by as much less: as many pixels of X's own at every stage, so that a coarse start is
        not shaken apart.
    tolerance
        Stop when the loss changed by less than this fraction between two logged steps; 0 never.
    log_every
        Steps between rows of the history.
    """

    steps: int = 400
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Literal["cosine", "constant"] = "cosine"
    multiplier_learning_rate: float = 0.02
    initial_multiplier: float = 1.0
    negative_multiplier: Literal["clamp", "remove"] = "clamp"
    minimum_multiplier: float = 0.0
    distance: Distance = "cosine"
    reduction: Literal["sum", "mean"] = "sum"
    stationarity_weight: float = 1.0
    primal_weight: float = 1.0
    augmented_weight: float = 1.0
    tv_weight: float = 0.03
    norm_weight: float = 0.1
    norm_target: float = BLACK
    augmentation: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(translate=0.0625, noise=0.5, fill=BLACK)
    )
    resolutions: tuple[float, ...] = (0.5,)
    growing_jitter: bool = False
    tolerance: float = 0.0
    log_every: int = 20

    @classmethod
    def photographs(cls, **changes: Any) -> SynthesisConfig:
        """Return a start for colour images: half size, then full; no pull to black; mirrored."""
        config = cls(
            tv_weight=0.3,
            norm_weight=0.0,
            norm_target=0.0,
            augmentation=AugmentationConfig(translate=0.125, flip=0.5, noise=0.1),
            resolutions=(0.5, 1.0),
        )
        return dataclasses.replace(config, **changes)

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_choice("negative_multiplier", self.negative_multiplier, ("clamp", "remove"))
        check_choice("distance", self.distance, DISTANCES)
        check_choice("reduction", self.reduction, ("sum", "mean"))
        for name in ("learning_rate", "initial_multiplier"):
            check_number(name, getattr(self, name), above=0)
        for name in ("steps", "log_every"):
            check_count(name, getattr(self, name))
        for name in ("multiplier_learning_rate", "minimum_multiplier", "tolerance"):
            check_number(name, getattr(self, name), at_least=0)
        for part in ("stationarity", "primal", "augmented", "tv", "norm"):
            check_number(f"{part}_weight", getattr(self, f"{part}_weight"), at_least=0)
        if self.minimum_multiplier and self.negative_multiplier == "remove":
            raise ValueError(
                f"minimum_multiplier: expected 0 where negative multipliers are removed, got "
                f"{self.minimum_multiplier!r}; set negative_multiplier='clamp'"
            )
        if self.minimum_multiplier > self.initial_multiplier:
            raise ValueError(
                f"minimum_multiplier: expected at most initial_multiplier="
                f"{self.initial_multiplier!r}, got {self.minimum_multiplier!r}; lower it"
            )
        if not all(0 < fraction <= 1 for fraction in self.resolutions):
            raise ValueError(
                f"resolutions: expected fractions of the image side above 0 and up to 1, got "
                f"{self.resolutions}; e.g. (0.5, 1.0)"
            )
        if len(self.resolutions) > self.steps:
            raise ValueError(
                f"steps: expected at least one for each of {len(self.resolutions)} resolutions, "
                f"got {self.steps}; raise it"
            )


@dataclass(frozen=True)
class Step:
    """What `on_step` sees after each step: copies, X at full size."""

    number: int
    inputs: Tensor
    multipliers: Tensor
    total: float


def synthesize(
    model: nn.Module,
    labels: Tensor | Sequence[int],
    shape: Sequence[int],
    *,
    config: SynthesisConfig | None = None,
    init: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | tuple[float, float] | None = None,
    params: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[Step], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
) -> Solution:
    """Make one deep support vector per label from noise, or from `init` (DSV Algorithm 1).

    Parameters
    ----------
    model
        A trained classifier; read in evaluation mode and left as it was, also after an error.
    labels
        Class numbers [n], or float rows [n, K] that sum to 1 (soft labels).
    shape
        One sample's shape, (C, H, W); (d,) for tabular data, without image terms.
    init
        Start of X, [n, *shape]: real images ("1 shot"), another data set's, or None for N(0, I).
    bounds
        Lowest and highest valid value, numbers or one per channel [C]; X is kept inside after
        every step. `Dataset.bounds` fits.
    params
        Parameters in the stationarity sum, a subset of ``dict(model.named_parameters())``.
    generator
        CPU generator for the start and the augmentation; default: a fresh one with seed 0.
    on_step
        Called after every step with a `Step`; an exception from it stops the run.
    checkpoint
        File that keeps the state of the run, written whole every `checkpoint_every` steps and
        removed at the end. Where it is there, the same call goes on from it, to the same result
        to the last bit (on the same machine); `on_step` sees only the steps still to do.

    Raises ValueError or TypeError for labels, shapes, starts or bounds that do not fit, for a model
    without second derivatives (naming the layer), and for a checkpoint of another run. A run that
    becomes non-finite ends with status `NON_FINITE` and the last finite samples.
    """
    config = config or SynthesisConfig()
    check_count("checkpoint_every", checkpoint_every)
    generator = generator or torch.Generator().manual_seed(0)
    started = generator.get_state()
    conditions = Conditions(model, params=params)
    theta = conditions.flat_theta
    labels = as_labels(labels).to(theta.device)
    size = tuple(int(side) for side in shape)
    x = _start(init, len(labels), size, generator).to(theta)
    multipliers = torch.full((len(labels),), float(config.initial_multiplier)).to(theta)
    limits = check_bounds(bounds, size, theta)
    run = _Run(conditions, config, labels, size, limits, generator, on_step)
    keeper = None
    if checkpoint is not None:
        keeper = Checkpoint(
            checkpoint,
            every=checkpoint_every,
            model={**model.state_dict(), **{f"θ {k}": v for k, v in conditions.theta.items()}},
            config=config,
            labels=labels,
            bounds=limits,
            start=(x, started),
        )
    with evaluation_mode(model), torch.enable_grad():
        status = run.optimise(x, multipliers, keeper)
        if config.distance == "cosine" and config.stationarity_weight:
            run.rescale()
    samples = SupportSet(run.at_full_size(run.x), run.labels, run.multipliers.detach())
    solution = Solution(
        samples=samples,
        status=status,
        history=pd.DataFrame(run.rows),
        residuals=residuals(model, samples, params=params),
        config=config,
    )
    if keeper is not None:
        keeper.remove()
    return solution


def _start(
    init: Tensor | None, count: int, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    if init is None:
        return torch.randn(count, *shape, generator=generator)
    check_inputs(init, "init")
    if tuple(init.shape) != (count, *shape):
        raise ValueError(
            f"init: expected shape {[count, *shape]} (one start per label), got "
            f"{list(init.shape)}; resize or repeat the starting images"
        )
    return init.detach().clone()


class _Run:
    """State of one run: X and Λ, their optimiser, and the history so far."""

    def __init__(
        self,
        conditions: Conditions,
        config: SynthesisConfig,
        labels: Tensor,
        shape: tuple[int, ...],
        limits: tuple[Tensor, Tensor] | None,
        generator: torch.Generator,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.conditions = conditions
        self.config = config
        self.labels = labels
        self.shape = shape
        self.limits = limits
        self.generator = generator
        self.on_step = on_step
        self.is_image = len(shape) == 3
        if not self.is_image:  # the priors and resolutions are about pixels
            self.config = dataclasses.replace(
                config, resolutions=(), tv_weight=0.0, norm_weight=0.0
            )
        self.rows: list[dict[str, float]] = []
        self.checked = False  # whether the model was seen to have second derivatives
        self.x = self.multipliers = torch.empty(0)
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def optimise(self, x: Tensor, multipliers: Tensor, keeper: Checkpoint | None) -> Status:
        """Run all stages; X and Λ are read from `self` afterwards."""
        self.x, self.multipliers = self._clamped(x), multipliers
        plan = list(self._plan())
        saved = keeper.read() if keeper else None
        done = 0 if saved is None else saved.step
        optimizer = self._optimizer() if saved is None else self._resume(saved)
        for number, (size, factor) in enumerate(
            progress_bar(plan[done:], "synthesis"), start=done + 1
        ):
            if size is not None:
                x = F.interpolate(self.x.detach(), size, mode="bilinear", antialias=True)
                self.x, self.multipliers = self._clamped(x), self.multipliers.detach()
                optimizer = self._optimizer()
            status = self._step(optimizer, number, factor)
            if status is not None:
                return status
            if keeper is not None and number % keeper.every == 0:
                keeper.write(self._state(optimizer, number))
        return Status.ALL_STEPS

    def _state(self, optimizer: torch.optim.Adam, number: int) -> State:
        """Return everything that the rest of the run depends on."""
        tensors = {"x": self.x, "multipliers": self.multipliers, "labels": self.labels}
        tensors["generator"] = self.generator.get_state()
        if self.last is not None:
            names = ("last x", "last multipliers", "last labels")
            tensors |= dict(zip(names, self.last, strict=True))
        for group, value in (("x", self.x), ("multipliers", self.multipliers)):
            tensors |= {f"adam {group} {k}": v for k, v in optimizer.state[value].items()}
        return State(number, tensors, self.rows)

    def _resume(self, saved: State) -> torch.optim.Adam:
        """Put back what `_state` returned, the generator's state too; return the optimiser."""

        def put(name: str) -> Tensor:
            return saved.tensors[name].to(self.labels.device)

        self.x, self.multipliers = put("x"), put("multipliers")
        self.last = (put("last x"), put("last multipliers"), put("last labels"))
        self.labels = put("labels")
        self.rows = saved.rows
        self.generator.set_state(saved.tensors["generator"])
        optimizer = self._optimizer()
        for group, value in (("x", self.x), ("multipliers", self.multipliers)):
            moments = {k: put(f"adam {group} {k}") for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[value] = {"step": saved.tensors[f"adam {group} step"]} | moments
        return optimizer

    def _plan(self) -> Iterator[tuple[list[int] | None, float]]:
        """Yield for each step the size (H, W) to change to, if any, and the rate's factor."""
        sizes: list[list[int] | None] = [
            [max(1, round(fraction * side)) for side in self.shape[-2:]]
            for fraction in self.config.resolutions
        ]
        stages = sizes or [None]
        for stage, size in enumerate(stages):
            steps = self.config.steps // len(stages) + (stage < self.config.steps % len(stages))
            for local in range(steps):
                factor = learning_rate_factor(self.config.schedule, local / steps)
                yield size if local == 0 else None, factor

    def _augmentation(self) -> AugmentationConfig:
        """Return A for the size that X has now: shifts grow with it where they are told to."""
        augmentation = self.config.augmentation
        if not (self.config.growing_jitter and self.config.resolutions):
            return augmentation
        largest = max(self.config.resolutions) * self.shape[-1]
        share = min(1.0, self.x.shape[-1] / max(1.0, largest))
        return dataclasses.replace(augmentation, translate=share * augmentation.translate)

    def _optimizer(self) -> torch.optim.Adam:
        """Return Adam on X and Λ, fresh for each resolution; group 0 is X, group 1 is Λ."""
        self.x.requires_grad_()
        self.multipliers.requires_grad_()
        rates = (self.config.learning_rate, self.config.multiplier_learning_rate)
        groups = [
            {"params": [value], "lr": rate, "initial_lr": rate}
            for value, rate in zip((self.x, self.multipliers), rates, strict=True)
        ]
        return torch.optim.Adam(groups, betas=self.config.betas)

    def _step(self, optimizer: torch.optim.Adam, number: int, factor: float) -> Status | None:
        """Take one step; return a status if the run is over."""
        total, metrics = self._loss()
        gradients = self._slopes(total)
        value = float(total.detach())
        finite = torch.stack([torch.isfinite(g).all() for g in (total, *gradients)]).all()
        if not finite:
            self._restore()
            return Status.NON_FINITE
        logged = number % self.config.log_every == 0 or number in (1, self.config.steps)
        if logged:
            self.rows.append({"step": number} | {k: float(v.detach()) for k, v in metrics.items()})
        # the samples that this loss was finite at: where we return to if the step goes wrong
        self.last = (self.x.detach().clone(), self.multipliers.detach().clone(), self.labels)
        for group, gradient in zip(optimizer.param_groups, gradients, strict=True):
            group["lr"] = group["initial_lr"] * factor
            group["params"][0].grad = gradient
        optimizer.step()
        with torch.no_grad():
            if self.limits is not None:
                self.x.clamp_(*self.limits)
            if self.config.negative_multiplier == "clamp":
                self.multipliers.clamp_(min=self.config.minimum_multiplier)
            elif not self._remove_negative(optimizer):
                self._restore()
                return Status.NO_CANDIDATES
        if self.on_step is not None:
            x, multipliers = self.at_full_size(self.x).clone(), self.multipliers.detach().clone()
            self.on_step(Step(number, x, multipliers, value))
        return self._converged() if logged else None

    def _slopes(self, total: Tensor) -> tuple[Tensor, ...]:
        """Return the derivatives of L_total in X and Λ."""
        try:
            if not self.checked:
                check_not_severed(total)
                self.checked = True
            return torch.autograd.grad(total, [self.x, self.multipliers], materialize_grads=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            x = self.at_full_size(self.x)
            raise ValueError(explain_failure(self.conditions.model, x, error)) from error

    def rescale(self) -> None:
        """Give Λ the scale that fits θ best: the cosine distance leaves it open."""
        losses, _ = self.conditions.losses(self.at_full_size(self.x), self.labels)
        parts = self.conditions.gradient(losses, self.multipliers.detach(), differentiable=False)
        scale = best_scale(self.conditions.flat_theta, torch.cat([p.reshape(-1) for p in parts]))
        if 0 < scale < float("inf"):
            self.multipliers = self.multipliers.detach() * scale

    def _restore(self) -> None:
        if self.last is not None:
            self.x, self.multipliers, self.labels = self.last

    def _loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_total and its unweighted terms."""
        config = self.config
        x = self.at_full_size(self.x, detach=False)
        plain = self._terms(x)
        total = self._kkt(plain)
        with torch.no_grad():
            metrics = {
                "stationarity": plain.stationarity,
                "primal": plain.primal,
                "feasible": is_feasible(plain.logits, self.labels).to(total.dtype).mean(),
                "entropy": entropy(plain.logits).mean(),
                "multiplier_sum": self.multipliers.sum(),
                "active": (self.multipliers > 0).to(total.dtype).mean(),
            }
        if config.augmented_weight and self.is_image:
            numbers = draw(
                self._augmentation(),
                len(x),
                (self.shape[0], self.shape[1], self.shape[2]),
                generator=self.generator,
                device=x.device,
                dtype=x.dtype,
            )
            augmented = self._terms(apply(x, numbers))
            total = total + config.augmented_weight * self._kkt(augmented)
            metrics["augmented_stationarity"] = augmented.stationarity
            metrics["augmented_primal"] = augmented.primal
        if config.tv_weight:
            metrics["tv"] = image_variation(x).mean() / x[0].numel()
            total = total + config.tv_weight * metrics["tv"]
        if config.norm_weight:
            metrics["norm"] = squared_norm(x, config.norm_target).mean()
            total = total + config.norm_weight * metrics["norm"]
        return total, {"total": total} | metrics

    def _terms(self, x: Tensor) -> Terms:
        weights = self.multipliers
        if self.config.reduction == "mean":
            weights = weights / len(weights)
        if self.config.stationarity_weight:
            return self.conditions.terms(x, self.labels, weights, self.config.distance)
        # no parameter gradient is needed then, nor its derivative
        losses, logits = self.conditions.losses(x, self.labels)
        return Terms(losses.new_zeros(()), primal_loss(losses, logits, self.labels), logits)

    def _kkt(self, terms: Terms) -> Tensor:
        config = self.config
        return config.stationarity_weight * terms.stationarity + config.primal_weight * terms.primal

    def at_full_size(self, x: Tensor, *, detach: bool = True) -> Tensor:
        """Return X at the size that the model reads."""
        x = x.detach() if detach else x
        if not self.is_image or x.shape[-2:] == self.shape[-2:]:
            return x
        return F.interpolate(x, size=self.shape[-2:], mode="bilinear")

    def _clamped(self, x: Tensor) -> Tensor:
        """Return a copy of `x` inside the limits."""
        return x.detach().clone() if self.limits is None else x.detach().clamp(*self.limits)

    def _remove_negative(self, optimizer: torch.optim.Adam) -> bool:
        """Drop samples with λ < 0 and their part of Adam's state; return False if none is left."""
        keep = self.multipliers.detach() >= 0
        if bool(keep.all()):
            return True
        if not bool(keep.any()):
            return False
        kept = []
        for group, value in zip(optimizer.param_groups, (self.x, self.multipliers), strict=True):
            state = optimizer.state.pop(value)
            new = value.detach()[keep].requires_grad_()
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name][keep]
            optimizer.state[new] = state
            group["params"] = [new]
            kept.append(new)
        self.x, self.multipliers = kept
        self.labels = self.labels[keep]
        return True

    def _converged(self) -> Status | None:
        if len(self.rows) < 2 or not self.config.tolerance:
            return None
        before, now = self.rows[-2]["total"], self.rows[-1]["total"]
        change = abs(now - before) / max(abs(before), 1e-12)
        return Status.CONVERGED if change < self.config.tolerance else None
