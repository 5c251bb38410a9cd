"""Multipliers λ of given samples: the DeepKKT conditions with x fixed (DSV §4.1, selection).

Two ways to fit λ ≥ 0 to θ = −Σᵢ λᵢ gᵢ, with gᵢ = ∇_θ L(Φ(xᵢ; θ), yᵢ):

    "gradient"   min_λ D(θ, −Gᵀλ) by Adam, the paper's way. With g = Gᵀλ and v = ∂D/∂g the
                 derivative in λ is Gv, so a step is two products with G. Where G is too large to
                 hold, they are three backward passes over the samples.
    "nnls"       min_λ ½‖θ + Gᵀλ‖² + (ρ/2)‖λ‖², 0 ≤ λ ≤ u, a convex problem, solved through the Gram
                 matrix K = GGᵀ and c = Gθ, with a certificate. In the cone picture −Gᵀλ is the
                 projection of θ on the cone of the −gᵢ, so it also has the largest cosine with θ.

Shapes: θ [P]; λ [n]; G [n, P] has a row per sample (`gradients`); K [n, n] and c [n] are float64
on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dsvlib._box_quadratic import minimise
from dsvlib._progress import progress_bar
from dsvlib._schedule import has_settled, learning_rate_factor
from dsvlib._validation import (
    as_generator,
    check_choice,
    check_count,
    check_finite,
    check_number,
    check_steps_possible,
)
from dsvlib.conditions import DISTANCES, Distance, best_scale, distance, residuals
from dsvlib.frozen import evaluation_mode
from dsvlib.gradients import SampleGradients
from dsvlib.logits import LossFn, entropy, predict
from dsvlib.solution import Certificate, Solution, Status
from dsvlib.support_set import SupportSet


@dataclass(frozen=True, kw_only=True)
class NNLSConfig:
    """The convex problem and what it may cost.

    upper
        Largest λ, as the C of a soft-margin SVM; None for none. Without one, a sample whose
        gradient nearly vanishes can take a λ of 10⁴ that says little (look at the certificate's
        `contribution`, or set a bound).
    ridge
        ρ ≥ 0 in units of the mean ‖gᵢ‖²: makes λ unique where gradients are dependent.
    tolerance
        How far the optimality conditions may be off, without units (see `Certificate`).
    memory
        Gigabytes that gradients and Gram matrix may take together. Gradient rows that do not fit
        are computed again, so a small number costs time, never precision.
    batch_size
        Samples differentiated at once; costs their activations on top of `memory`.
    """

    upper: float | None = None
    ridge: float = 0.0
    tolerance: float = 1e-8
    memory: float = 2.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.upper is not None:
            check_number("upper", self.upper, above=0)
        check_number("ridge", self.ridge, at_least=0)
        check_number("tolerance", self.tolerance, above=0)
        check_number("memory", self.memory, above=0)
        check_count("batch_size", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """The paper's fit of λ by gradient steps.

    steps, learning_rate, schedule
        Adam steps on λ in units of the best equal multiplier, so that one rate fits every scale of
        θ; ``"cosine"`` lowers the rate to zero, ``"constant"`` keeps it.
    distance
        D: ``"cosine"`` (blind to the scale of λ, which is set at the end to the best one),
        ``"l1"`` or ``"l2"``.
    negative_multiplier
        ``"clamp"`` λ to 0, or ``"remove"`` the sample for good as the paper does: it keeps its
        place in the result with λ = 0, and is not read again.
    start
        λ starts ``"equal"`` (the best equal multiplier) or ``"random"`` (that times U[0, 2]).
    memory
        Gigabytes that G may take. Where it takes more, it is not held and each step reads all
        samples twice; 0 never holds it.
    batch_size
        Samples read at once; bounds memory and changes nothing else.
    tolerance
        Stop when D changed by less than this fraction between two logged steps; 0 never.
    log_every
        Steps between rows of the history.
    """

    steps: int = 200
    learning_rate: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    distance: Distance = "cosine"
    negative_multiplier: Literal["clamp", "remove"] = "clamp"
    start: Literal["equal", "random"] = "equal"
    memory: float = 0.5
    batch_size: int = 200
    tolerance: float = 0.0
    log_every: int = 10

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_choice("distance", self.distance, DISTANCES)
        check_choice("negative_multiplier", self.negative_multiplier, ("clamp", "remove"))
        check_choice("start", self.start, ("equal", "random"))
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("tolerance", self.tolerance, at_least=0)
        check_number("memory", self.memory, at_least=0)
        for name in ("steps", "batch_size", "log_every"):
            check_count(name, getattr(self, name))


def fit_multipliers(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | Sequence[int],
    *,
    method: Literal["nnls", "gradient"] = "nnls",
    params: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    config: NNLSConfig | GradientConfig | None = None,
    init: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Solution:
    """Fit the multipliers of given samples to θ = −Σᵢ λᵢ ∇_θ L(Φ(xᵢ; θ), yᵢ), λ ≥ 0.

    Parameters
    ----------
    model
        A trained classifier [n, …] → [n, K]; read in evaluation mode and left as it was, also after
        an error. Where `torch.func` cannot transform it, gradients are computed sample by sample,
        with a warning.
    inputs, labels
        The candidates: float [n, …]; int64 [n] or float [n, K]. Moved to the model's device.
    method
        ``"nnls"``: the exact convex problem; memory and time grow with n² (thousands of samples).
        ``"gradient"``: the paper's; memory is bounded whatever n is (50,000 images and more).
    params
        Parameters in the stationarity sum, a subset of ``dict(model.named_parameters())``;
        default: all that require grad.
    loss_fn
        ``loss_fn(logits, labels) -> [n]`` without reduction; default: cross-entropy.
    config
        An `NNLSConfig` or a `GradientConfig`, as the method asks.
    init
        Where λ ≥ 0 starts, [n], for ``"gradient"``. A convex problem needs no start.
    generator
        CPU generator for a random start; default: a fresh one with seed 0.
    on_step
        For ``"gradient"``: called with the number of steps taken and λ [n] then, from 0 on. With
        the cosine distance the solution has the last of these at its best scale.

    Returns
    -------
    `samples` keeps every candidate in its order with its λ; `history` has a row per logged step
    (for ``"nnls"`` one, at the end) where `entropy` is the λ-weighted mean entropy of the
    candidates in nats; `certificate` is there for ``"nnls"``. Samples whose gradient is below
    rounding of the largest one have λ = 0, since no direction can be read from them. λ is not
    unique where gradients are dependent (`certificate.unique`); ``"nnls"`` then returns a solution
    with independent active gradients, hence at most P of them, unless `upper` is met.

    Status: `OPTIMAL` or `NOT_OPTIMAL` (nnls); `ALL_STEPS`, `CONVERGED`, `NO_CANDIDATES` or
    `NON_FINITE` (gradient); `NO_GRADIENTS` where all gradients vanish. λ = 0 throughout is also the
    true optimum where no gradient has a component along −θ.

    Raises ValueError or TypeError for shapes, labels, starts or configurations that do not fit, for
    losses or gradients that are not finite, and where the Gram matrix exceeds `memory`.
    """
    check_choice("method", method, ("nnls", "gradient"))
    config = config or (NNLSConfig() if method == "nnls" else GradientConfig())
    wanted = NNLSConfig if method == "nnls" else GradientConfig
    if not isinstance(config, wanted):
        raise TypeError(
            f"config: expected {wanted.__name__} for method {method!r}, got "
            f"{type(config).__name__}; each method has its own"
        )
    gradients = SampleGradients(
        model, inputs, labels, params=params, loss_fn=loss_fn, batch_size=config.batch_size
    )
    if isinstance(config, NNLSConfig) and init is not None:
        raise ValueError(
            "init: expected None for method 'nnls', got a tensor; the convex problem has one "
            "optimum wherever it starts, use method='gradient' to start from given multipliers"
        )
    generator = as_generator(generator)
    with evaluation_mode(model):
        logits = gradients.logits()
        entropies = entropy(logits) if logits.shape[1] > 1 else None
        if isinstance(config, NNLSConfig):
            fit = _fit_nnls(gradients, entropies, config)
        else:
            fit = _fit_gradient(gradients, entropies, config, init, generator, on_step)
    samples = SupportSet(gradients.inputs, gradients.labels, fit.multipliers)
    return Solution(
        samples=samples,
        status=fit.status,
        history=pd.DataFrame(fit.rows),
        residuals=residuals(
            model, samples, params=params, loss_fn=loss_fn, batch_size=config.batch_size
        ),
        config=config,
        certificate=fit.certificate,
    )


class _Fit(NamedTuple):
    multipliers: Tensor  # [n], in the model's dtype
    status: Status
    rows: list[dict[str, float]]
    certificate: Certificate | None = None


def _row(multipliers: Tensor, entropies: Tensor | None, **terms: float) -> dict[str, float]:
    """Return a row of the history at λ."""
    total = float(multipliers.sum())
    row = terms | {
        "multiplier_sum": total,
        "active": float((multipliers > 0).to(multipliers.dtype).mean()),
    }
    if entropies is not None:
        # the mean over no sample at all is not a number; nothing is hidden by saying so
        row["entropy"] = float(multipliers @ entropies) / total if total else float("nan")
    return row


# The paper's way ---------------------------------------------------------------------------------


def _fit_gradient(
    gradients: SampleGradients,
    entropies: Tensor | None,
    config: GradientConfig,
    init: Tensor | None,
    generator: torch.Generator,
    on_step: Callable[[int, Tensor], None] | None,
) -> _Fit:
    """Minimise D(θ, −Gᵀλ) over λ ≥ 0 with Adam on λ / unit."""
    theta = gradients.theta
    check_steps_possible(theta)
    gradients.hold(config.memory)
    kept = torch.arange(len(gradients), device=theta.device)
    unit, scaled = _start(gradients, config, init, generator)
    # confident samples have derivatives far below Adam's default ε of 1e-8, which would freeze them
    optimizer = torch.optim.Adam([scaled], lr=config.learning_rate, eps=1e-20)
    rows: list[dict[str, float]] = []
    multipliers = good = unit * scaled
    status = Status.ALL_STEPS
    for step in progress_bar(range(config.steps + 1), "multipliers"):
        multipliers = unit * scaled
        total = gradients.weighted_sum(multipliers, kept)
        value, direction = _distance(theta, total, config.distance)
        derivative = gradients.directional(direction, kept)
        if not bool(torch.isfinite(derivative).all() and torch.isfinite(value)):
            return _Fit(good, Status.NON_FINITE, rows)
        if step == 0 and not bool(derivative.any()) and _all_vanish(gradients):
            zero = torch.zeros_like(scaled)
            row = _row(zero, entropies, step=0, distance=float(value))
            return _Fit(zero, Status.NO_GRADIENTS, [row])
        good = multipliers
        if on_step is not None:
            on_step(step, multipliers.clone())
        if step % config.log_every == 0 or step == config.steps:
            rows.append(_row(multipliers, entropies, step=step, distance=float(value)))
            if has_settled([row["distance"] for row in rows[-2:]], config.tolerance):
                status = Status.CONVERGED
                break
        if step == config.steps:
            break
        scaled.grad = derivative * unit
        factor = learning_rate_factor(config.schedule, step / config.steps)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        optimizer.step()
        if config.negative_multiplier == "remove":
            kept = kept[scaled[kept] >= 0]
            if not len(kept):
                status = Status.NO_CANDIDATES
                break
            scaled.copy_(torch.zeros_like(scaled).index_copy_(0, kept, scaled[kept]))
        scaled.clamp_(min=0)
        if config.distance == "cosine" and not bool(scaled.any()):
            scaled.copy_(multipliers / unit)  # at λ = 0 the cosine has no slope that leads away
    if config.distance == "cosine":
        # D is the same for every scale; this one fits θ best, and 0 where none does
        multipliers = multipliers * max(0.0, best_scale(theta, total))
    # the last row has the multipliers that are returned
    rows = [row for row in rows if row["step"] < step]
    rows.append(_row(multipliers, entropies, step=step, distance=float(value)))
    return _Fit(multipliers, status, rows)


def _start(
    gradients: SampleGradients,
    config: GradientConfig,
    init: Tensor | None,
    generator: torch.Generator,
) -> tuple[float, Tensor]:
    """Return the unit of λ and λ / unit, [n]."""
    theta, count = gradients.theta, len(gradients)
    if init is not None:
        check_finite("init", init)
        if init.shape != (count,) or bool((init < 0).any()) or not bool(init.any()):
            raise ValueError(
                f"init: expected one multiplier ≥ 0 per sample, shape [{count}], and not all 0, "
                f"got {list(init.shape)} from {float(init.min()):g} to {float(init.max()):g}; "
                f"start from torch.ones({count}) if in doubt"
            )
        unit = float(init.detach().mean())
        return unit, init.detach().to(theta) / unit
    ones = torch.ones(count).to(theta)
    factor = best_scale(theta, gradients.weighted_sum(ones))
    unit = factor if 0 < factor < np.inf else 1.0
    if config.start == "random":
        return unit, 2 * torch.rand(count, generator=generator).to(theta)
    return unit, ones


def _all_vanish(gradients: SampleGradients) -> bool:
    """Whether every gᵢ is 0: only then is its product with a random vector."""
    probe = torch.randn(len(gradients.theta), generator=torch.Generator().manual_seed(0))
    return not bool(gradients.directional(probe.to(gradients.theta)).any())


def _distance(theta: Tensor, gradient: Tensor, kind: Distance) -> tuple[Tensor, Tensor]:
    """Return D(θ, −g) and v = ∂D/∂g, [P]."""
    with torch.enable_grad():
        gradient = gradient.detach().requires_grad_()
        value = distance(theta, gradient, kind)
        (direction,) = torch.autograd.grad(value, gradient)
    return value.detach(), direction


# The convex problem ------------------------------------------------------------------------------


def _fit_nnls(gradients: SampleGradients, entropies: Tensor | None, config: NNLSConfig) -> _Fit:
    """Solve min ½λᵀKλ + cᵀλ + (ρ/2)‖λ‖², 0 ≤ λ ≤ u, in coordinates where every gradient has norm 1.

    There the unknown is μᵢ = λᵢ‖gᵢ‖/‖θ‖. Gradient norms spread over nine orders of magnitude on a
    confident network, and the scaling is what keeps the problem within reach of float64.
    """
    gram, projection = gradients.gram(config.memory)
    norms = np.sqrt(np.diag(gram))
    if not np.isfinite(gram.sum() + projection.sum()):
        bad = int((~np.isfinite(norms)).sum())
        raise ValueError(
            f"inputs: expected finite parameter gradients, got NaN or infinite ones for {bad} of "
            f"{len(norms)} samples; drop them, or lower the scale of the inputs"
        )
    smallest = torch.finfo(gradients.theta.dtype).eps * norms.max()
    kept = np.flatnonzero(norms > smallest)  # below, a gradient is rounding and points nowhere
    gram = gram[np.ix_(kept, kept)]
    ridge = config.ridge * float(np.mean(norms**2))
    gram[np.diag_indices_from(gram)] += ridge
    scale = np.sqrt(norms[kept] ** 2 + ridge)
    gram /= scale[:, None]
    gram /= scale[None, :]
    theta_norm = float(gradients.theta.double().norm())
    unit = theta_norm / scale  # λ = unit · μ
    upper = np.full(len(kept), np.inf) if config.upper is None else config.upper / unit
    minimum = minimise(gram, projection[kept] / scale / theta_norm, upper, config.tolerance)
    at_bound = minimum.x >= upper
    multipliers = np.zeros_like(norms)
    # at the bound exactly, whatever the scaling rounds to
    multipliers[kept] = np.where(at_bound, config.upper or 0.0, unit * minimum.x)

    fitted = torch.as_tensor(multipliers).to(gradients.theta)
    with torch.no_grad():
        rest = gradients.theta + gradients.weighted_sum(fitted)
    reduced = np.zeros_like(norms)
    reduced[kept] = minimum.gradient
    labels, values = gradients.labels, minimum.eigenvalues
    certificate = Certificate(
        stationarity=float(rest.norm()) / theta_norm,  # measured apart from the Gram matrix
        multiplier_min=float(multipliers.min()),
        multiplier_max=float(multipliers.max()),
        gradient_min=float(min(minimum.gradient[minimum.x == 0], default=0)),
        complementarity=minimum.complementarity,
        violation=minimum.violation,
        gap=minimum.gap,
        active=float((multipliers > 0).mean()),
        at_bound=float(at_bound.sum() / len(norms)),
        rank=len(values),
        condition=float(values[-1] / values[0]) if len(values) else float("inf"),
        unique=minimum.unique,
        tolerance=config.tolerance,
        per_sample=pd.DataFrame(
            {
                "label": (predict(labels - 0.5) if labels.ndim == 2 else labels).tolist(),
                "multiplier": multipliers,
                "gradient_norm": norms,
                "contribution": multipliers * norms,
                "reduced_gradient": reduced,
            }
        ),
    )
    status = Status.OPTIMAL if certificate.satisfied else Status.NOT_OPTIMAL
    if not len(kept):
        status = Status.NO_GRADIENTS
    row = _row(fitted, entropies, step=1, stationarity=certificate.stationarity)
    return _Fit(fitted, status, [row], certificate)
