"""Multipliers λ of given samples: the DeepKKT conditions with x fixed (DSV §4.1, selection).

Two ways to fit λ ≥ 0 to θ = −Σᵢ λᵢ gᵢ, with gᵢ = ∇_θ L(Φ(xᵢ; θ), yᵢ):

    "gradient"   min_λ D(θ, −Σ λᵢ gᵢ) by Adam, the paper's way. Σ λᵢ gᵢ is one weighted backward
                 pass, and with v = ∂D/∂g the derivative in λᵢ is v·gᵢ, the change of the i-th loss
                 along v: one forward-mode pass. No gᵢ is ever formed, so memory stays flat.
    "nnls"       min_λ ½‖θ + Gᵀλ‖² + (ρ/2)‖λ‖², 0 ≤ λ ≤ u, a convex problem, solved through the Gram
                 matrix K = GGᵀ and c = Gθ, with a certificate. In the cone picture −Gᵀλ is the
                 projection of θ on the cone of the −gᵢ, so it also has the largest cosine with θ.

Shapes: G [n, P] has a row per sample and is never whole in memory unless it fits; K [n, n] and c
[n] are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsvlib.analysis import entropy
from dsvlib.conditions import Conditions, LossFn, evaluation_mode, residuals
from dsvlib.distance import DISTANCES, Distance, best_scale, distance
from dsvlib.progress import progress_bar
from dsvlib.samples import SupportSet
from dsvlib.solution import Certificate, Solution, Status
from dsvlib.training import learning_rate_factor
from dsvlib.validation import (
    as_labels,
    check_choice,
    check_finite,
    check_inputs,
    check_number,
    check_same_length,
)

Vector = NDArray[np.float64]


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
    memory: float = 2.5
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.upper is not None:
            check_number("upper", self.upper, above=0)
        check_number("ridge", self.ridge, at_least=0)
        check_number("tolerance", self.tolerance, above=0)
        check_number("memory", self.memory, above=0)
        check_number("batch_size", self.batch_size, at_least=1)


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """The paper's fit of λ by gradient steps; each step reads all samples twice.

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
    batch_size: int = 500
    tolerance: float = 0.0
    log_every: int = 10

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_choice("distance", self.distance, DISTANCES)
        check_choice("negative_multiplier", self.negative_multiplier, ("clamp", "remove"))
        check_choice("start", self.start, ("equal", "random"))
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("tolerance", self.tolerance, at_least=0)
        for name in ("steps", "batch_size", "log_every"):
            check_number(name, getattr(self, name), at_least=1)


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
) -> Solution:
    """Fit the multipliers of given samples to θ = −Σᵢ λᵢ ∇_θ L(Φ(xᵢ; θ), yᵢ), λ ≥ 0.

    Parameters
    ----------
    model
        A trained classifier [n, …] → [n, K]; read in evaluation mode and left as it was, also after
        an error. Its operations must be ones that `torch.func` can transform.
    inputs, labels
        The candidates: float [n, …]; int64 [n] or float [n, K]. Moved to the model's device.
    method
        ``"nnls"``: the exact convex problem; memory and time grow with n² (thousands of samples).
        ``"gradient"``: the paper's; memory does not grow with n (50,000 images and more).
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
    problem = _Problem(model, inputs, labels, params, loss_fn, config.batch_size)
    if isinstance(config, NNLSConfig) and init is not None:
        raise ValueError(
            "init: expected None for method 'nnls', got a tensor; the convex problem has one "
            "optimum wherever it starts, use method='gradient' to start from given multipliers"
        )
    start = None if init is None else _checked_start(init, len(problem.inputs))
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):  # fused attention has no jvp
        problem.survey()
        if isinstance(config, NNLSConfig):
            fit = _fit_nnls(problem, config)
        else:
            generator = generator or torch.Generator().manual_seed(0)
            fit = _fit_gradient(problem, config, start, generator)
    samples = SupportSet(problem.inputs, problem.labels, fit.multipliers)
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


def _checked_start(init: Tensor, count: int) -> Tensor:
    if init.ndim != 1 or len(init) != count:
        raise ValueError(
            f"init: expected one multiplier per sample, shape [{count}], got "
            f"{list(init.shape)}; start from torch.ones({count}) if in doubt"
        )
    check_finite("init", init)
    if bool((init < 0).any()) or not bool(init.any()):
        raise ValueError(
            f"init: expected multipliers ≥ 0 and not all 0, got values from {float(init.min()):g} "
            f"to {float(init.max()):g}; clamp them"
        )
    return init


class _Problem:
    """The samples and the model, and the three products with G that the methods need."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor | Sequence[int],
        params: Mapping[str, Tensor] | None,
        loss_fn: LossFn | None,
        batch_size: int,
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
        self.entropies: Tensor | None = None

    def survey(self) -> None:
        """Read every sample once: check labels and losses, and note the entropies, [n]."""
        seen = []
        with torch.no_grad():
            for batch in self._batches(torch.arange(len(self.inputs))):
                losses, logits = self.conditions.losses(self.inputs[batch], self.labels[batch])
                check_finite("losses of the samples", losses)
                seen.append(entropy(logits) if logits.shape[1] > 1 else losses.new_zeros(0))
        if logits.shape[1] > 1:
            self.entropies = torch.cat(seen)

    def weighted_gradient(self, multipliers: Tensor, index: Tensor) -> Tensor:
        """Return Gᵀλ over the samples at `index`, [P], one backward pass per batch."""
        total = torch.zeros_like(self.theta)
        with torch.enable_grad():
            for batch in self._batches(index):
                losses, _ = self.conditions.losses(self.inputs[batch], self.labels[batch])
                parts = self.conditions.gradient(losses, multipliers[batch], differentiable=False)
                total += torch.cat([part.reshape(-1) for part in parts])
        return total

    def directional(self, direction: Tensor, index: Tensor) -> Tensor:
        """Return (G v)ᵢ = v·∇_θ Lᵢ for the samples at `index`, [n] (0 elsewhere), forward-mode."""
        theta = self._plain_theta()
        sizes = [value.numel() for value in theta.values()]
        parts = direction.split(sizes)
        tangent = {k: p.view_as(theta[k]) for k, p in zip(theta, parts, strict=True)}
        out = torch.zeros(len(self.inputs)).to(self.theta)
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

    def row(self, multipliers: Tensor, **terms: float) -> dict[str, float]:
        """Return a row of the history at λ."""
        total = float(multipliers.sum())
        row = terms | {
            "multiplier_sum": total,
            "active": float((multipliers > 0).to(multipliers.dtype).mean()),
        }
        if self.entropies is not None:
            # the mean over no sample at all is not a number; nothing is hidden by saying so
            row["entropy"] = float(multipliers @ self.entropies) / total if total else float("nan")
        return row

    def _losses(self, theta: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        # native operations: the rewritten ones serve double backward, not torch.func
        logits = functional_call(self.conditions.model, theta, (inputs,))
        return self.conditions.loss_fn(logits, labels)

    def _plain_theta(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.conditions.theta.items()}

    def _batches(self, index: Tensor) -> Iterator[Tensor]:
        return iter(index.to(self.theta.device).split(self.batch_size))


# The paper's way ---------------------------------------------------------------------------------


def _fit_gradient(
    problem: _Problem, config: GradientConfig, init: Tensor | None, generator: torch.Generator
) -> _Fit:
    """Minimise D(θ, −Gᵀλ) over λ ≥ 0 with Adam on λ / unit."""
    theta = problem.theta
    kept = everyone = torch.arange(len(problem.inputs), device=theta.device)
    unit, scaled = _start(problem, config, init, generator, kept)
    # confident samples have derivatives far below Adam's default ε of 1e-8, which would freeze them
    optimizer = torch.optim.Adam([scaled], lr=config.learning_rate, eps=1e-20)
    rows: list[dict[str, float]] = []
    last = scaled.clone()
    status, done = Status.ALL_STEPS, config.steps
    for step in progress_bar(range(config.steps), "multipliers"):
        value, direction = _distance(theta, problem.weighted_gradient(unit * scaled, kept), config)
        derivative = problem.directional(direction, kept)
        if not bool(torch.isfinite(derivative).all() and torch.isfinite(value)):
            return _Fit(unit * last, Status.NON_FINITE, rows)
        if step == 0 and not bool(derivative.any()):
            zero = torch.zeros_like(scaled)
            row = problem.row(zero, step=0, distance=float(value))
            return _Fit(zero, Status.NO_GRADIENTS, [row])
        if step % config.log_every == 0:
            rows.append(problem.row(unit * scaled, step=step, distance=float(value)))
            if _has_converged(rows, config.tolerance):
                status, done = Status.CONVERGED, step
                break
        last = scaled.clone()
        scaled.grad = derivative * unit
        factor = learning_rate_factor(config.schedule, step / config.steps)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        optimizer.step()
        if config.negative_multiplier == "remove":
            kept = kept[scaled[kept] >= 0]
            if not len(kept):
                scaled, status, done = last, Status.NO_CANDIDATES, step
                break
            scaled.copy_(torch.zeros_like(scaled).index_copy_(0, kept, scaled[kept]))
        scaled.clamp_(min=0)
    multipliers = unit * scaled
    total = problem.weighted_gradient(multipliers, everyone)
    if config.distance == "cosine":
        factor = best_scale(theta, total)  # D is the same for every scale; this one fits θ best
        multipliers = multipliers * factor if factor > 0 else multipliers
    value, _ = _distance(theta, total, config)
    # the last row has the multipliers that are returned
    rows = [row for row in rows if row["step"] < done]
    return _Fit(
        multipliers, status, [*rows, problem.row(multipliers, step=done, distance=float(value))]
    )


def _start(
    problem: _Problem,
    config: GradientConfig,
    init: Tensor | None,
    generator: torch.Generator,
    index: Tensor,
) -> tuple[float, Tensor]:
    """Return the unit of λ and λ / unit, [n]."""
    theta = problem.theta
    if init is not None:
        start = init.detach().to(theta).clone()
        unit = float(start.mean())
        return unit, start / unit
    ones = torch.ones(len(problem.inputs)).to(theta)
    factor = best_scale(theta, problem.weighted_gradient(ones, index))
    unit = factor if factor > 0 and np.isfinite(factor) else 1.0
    if config.start == "random":
        return unit, 2 * torch.rand(len(ones), generator=generator).to(theta)
    return unit, ones


def _distance(theta: Tensor, gradient: Tensor, config: GradientConfig) -> tuple[Tensor, Tensor]:
    """Return D(θ, −g) and v = ∂D/∂g, [P]."""
    with torch.enable_grad():
        gradient = gradient.detach().requires_grad_()
        value = distance(theta, gradient, config.distance)
        (direction,) = torch.autograd.grad(value, gradient)
    return value.detach(), direction


def _has_converged(rows: list[dict[str, float]], tolerance: float) -> bool:
    if len(rows) < 2 or not tolerance:
        return False
    before, now = rows[-2]["distance"], rows[-1]["distance"]
    return abs(now - before) < tolerance * max(abs(before), 1e-12)


# The convex problem ------------------------------------------------------------------------------


def _fit_nnls(problem: _Problem, config: NNLSConfig) -> _Fit:
    """Solve min ½λᵀKλ + cᵀλ + (ρ/2)‖λ‖², 0 ≤ λ ≤ u, in coordinates where every gradient has norm 1.

    There λ is the contribution μᵢ = λᵢ‖gᵢ‖. Gradient norms spread over nine orders of magnitude on
    a confident network, and the scaling is what keeps the problem within reach of float64.
    """
    gram, projection = _gram(problem, config.memory)
    norms = np.sqrt(np.diag(gram))
    if not np.isfinite(gram.sum() + projection.sum()):
        bad = int((~np.isfinite(norms)).sum())
        raise ValueError(
            f"inputs: expected finite parameter gradients, got NaN or infinite ones for {bad} of "
            f"{len(norms)} samples; drop them, or lower the scale of the inputs"
        )
    smallest = torch.finfo(problem.theta.dtype).eps * norms.max()
    kept = np.flatnonzero(norms > smallest)  # below, a gradient is rounding and points nowhere
    ridge = config.ridge * float(np.mean(norms**2))
    scale = np.sqrt(norms[kept] ** 2 + ridge)
    theta_norm = float(problem.theta.double().norm())
    upper = np.full(len(kept), np.inf) if config.upper is None else config.upper * scale
    if len(kept):
        gram = gram[np.ix_(kept, kept)]
        gram[np.diag_indices_from(gram)] += ridge
        gram /= scale[:, None]
        gram /= scale[None, :]
        quadratic = _Quadratic.factor(gram, projection[kept] / scale / theta_norm)
        contribution = quadratic.minimise(upper / theta_norm, config.tolerance)
        reduced = quadratic.gradient(contribution)
        spectrum = quadratic.eigenvalues
    else:
        contribution = reduced = spectrum = np.zeros(0)
    multipliers, all_reduced = np.zeros_like(norms), np.zeros_like(norms)
    multipliers[kept], all_reduced[kept] = contribution * theta_norm / scale, reduced
    at_bound = contribution >= upper / theta_norm
    multipliers[kept[at_bound]] = config.upper or 0.0  # exactly, whatever the scaling rounds to
    zero = contribution == 0
    violations = np.where(zero, -reduced, np.where(at_bound, reduced, np.abs(reduced)))
    products = contribution * reduced
    fitted = torch.as_tensor(multipliers).to(problem.theta)
    everyone = torch.arange(len(norms))
    with torch.no_grad():
        rest = problem.theta + problem.weighted_gradient(fitted, everyone)
    binding = np.flatnonzero(np.abs(reduced) <= config.tolerance)
    certificate = Certificate(
        stationarity=float(rest.norm()) / theta_norm,  # measured apart from the Gram matrix
        multiplier_min=float(multipliers.min()),
        multiplier_max=float(multipliers.max()),
        gradient_min=float(min(reduced[zero], default=0.0)),
        complementarity=float(max(np.abs(products[~at_bound]), default=0.0)),
        violation=float(max(violations, default=0.0)),
        gap=float(np.abs(products[~at_bound]).sum() + np.maximum(products[at_bound], 0).sum()),
        active=float((multipliers > 0).mean()),
        at_bound=float(at_bound.sum() / len(norms)),
        rank=len(spectrum),
        condition=float(spectrum[-1] / spectrum[0]) if len(spectrum) else float("inf"),
        unique=len(spectrum) == len(kept) or _is_regular(gram[np.ix_(binding, binding)]),
        tolerance=config.tolerance,
        per_sample=pd.DataFrame(
            {
                "label": (
                    problem.labels.argmax(dim=1) if problem.labels.ndim == 2 else problem.labels
                ).tolist(),
                "multiplier": multipliers,
                "gradient_norm": norms,
                "contribution": multipliers * norms,
                "reduced_gradient": all_reduced,
            }
        ),
    )
    if not len(kept):
        status = Status.NO_GRADIENTS
    else:
        status = Status.OPTIMAL if certificate.satisfied else Status.NOT_OPTIMAL
    row = problem.row(fitted, step=1, stationarity=certificate.stationarity)
    return _Fit(fitted, status, [row], certificate)


def _gram(problem: _Problem, memory: float) -> tuple[Vector, Vector]:
    """Return K = GGᵀ [n, n] and c = Gθ [n] in float64, with as many rows of G held as fit.

    G is read in panels of rows that are held, each against strips of the rows after it that are
    computed for it. One panel is enough where G fits. Products are summed in float64 although the
    rows are in the model's dtype: then K is positive semidefinite to 1e-16 and not to 1e-7.
    """
    count, width = len(problem.inputs), len(problem.theta)
    budget = memory * 1e9
    if 56 * count**2 > budget:  # K, its eigenvectors, the factor and the solvers' copies of them
        raise ValueError(
            f"memory: expected at least {56e-9 * count**2:.3g} GB for the Gram matrix of {count} "
            f"samples, got {memory:g}; raise NNLSConfig.memory, pass fewer samples, or use "
            f"method='gradient'"
        )
    capacity = int((budget - 8 * count**2) / (width * problem.theta.element_size()))
    if capacity < 4:
        raise ValueError(
            f"memory: expected room for at least 4 gradients of {width} parameters, got "
            f"{memory:g} GB; raise NNLSConfig.memory, restrict params, or use method='gradient'"
        )
    strip = min(256, max(1, capacity // 4), count)
    panel = count if capacity >= count else capacity - strip
    held = problem.theta.new_empty(panel, width)
    passing = problem.theta.new_empty(strip if panel < count else 0, width)
    gram, projection = np.zeros((count, count)), np.zeros(count)
    for start in progress_bar(range(0, count, panel), "Gram matrix"):
        stop = min(start + panel, count)
        rows = problem.fill(held[: stop - start], start)
        projection[start:stop] = _product(rows, problem.theta[None])[:, 0]
        for first in range(start, stop, strip):  # inside the panel, the lower triangle only
            last = min(first + strip, stop)
            own = rows[first - start : last - start]
            gram[first:last, start:last] = _product(own, rows[: last - start])
        for first in range(stop, count, strip):
            last = min(first + strip, count)
            gram[first:last, start:stop] = _product(
                problem.fill(passing[: last - first], first), rows
            )
    for first in range(0, count, 256):  # mirror without a second matrix
        last = first + 256
        gram[:first, first:last] = gram[first:last, :first].T
        block = gram[first:last, first:last]
        block[:] = np.tril(block) + np.tril(block, -1).T
    return gram, projection


def _product(left: Tensor, right: Tensor) -> Vector:
    """Return left @ rightᵀ in float64, converting a slab of columns at a time (64 MB)."""
    total = np.zeros((len(left), len(right)))
    slab = max(64, 8_000_000 // (len(left) + len(right)))
    for start in range(0, left.shape[1], slab):
        a, b = (_double(side[:, start : start + slab]) for side in (left, right))
        total += (a @ b.T).cpu().numpy()
    return total


def _double(value: Tensor) -> Tensor:
    return value.cpu().double() if value.device.type == "mps" else value.double()


@dataclass(frozen=True, eq=False)
class _Quadratic:
    """½xᵀKx + cᵀx with K positive semidefinite of unit diagonal, [m, m], and c in its range."""

    matrix: Vector
    linear: Vector
    eigenvalues: Vector  # those above rounding, ascending
    root: Vector  # A with AᵀA = K
    target: Vector  # b with −Aᵀb = c: the objective is ½‖Ax − b‖² up to a constant

    @classmethod
    def factor(cls, matrix: Vector, linear: Vector) -> _Quadratic:
        from scipy.linalg import eigh

        values, vectors = eigh(matrix)
        retained = values > values[-1] * len(values) * np.finfo(np.float64).eps
        values, vectors = values[retained], vectors[:, retained]
        roots = np.sqrt(values)
        target = -(vectors.T @ linear) / roots
        return cls(matrix, linear, values, np.ascontiguousarray((vectors * roots).T), target)

    def gradient(self, x: Vector) -> Vector:
        """Return Kx + c."""
        return self.matrix @ x + self.linear

    def minimise(self, upper: Vector, tolerance: float) -> Vector:
        """Return a minimiser over 0 ≤ x ≤ upper.

        SciPy's Lawson-Hanson solver covers the problem without bound and returns independent active
        columns. Its bounded solvers take minutes here, so a finite bound (and what is left of an
        iteration limit) is met from there by exchanging one variable at a time.
        """
        from scipy.optimize import nnls

        try:
            x, _ = nnls(self.root, self.target)
        except RuntimeError:  # its iteration limit: start again from nothing
            x = np.zeros_like(self.linear)
        return self._exchange(np.clip(x, 0, upper), upper, tolerance / 10)

    def _exchange(self, x: Vector, upper: Vector, tolerance: float) -> Vector:
        """Primal active-set method: solve on the free variables, then free the worst bound one."""
        free = (x > 0) & (x < upper)
        for _ in range(10 * len(x)):
            self._solve_free(x, free, upper)
            gradient = self.gradient(x)
            gain = np.where(free, 0, np.where(x > 0, gradient, -gradient))
            worst = int(gain.argmax())
            if gain[worst] <= tolerance:
                break
            free[worst] = True
        return x

    def _solve_free(self, x: Vector, free: NDArray[np.bool_], upper: Vector) -> None:
        """Minimise over the free variables in place; those that meet a bound are no longer free."""
        from scipy.linalg import cho_factor, cho_solve

        while free.any():
            index = np.flatnonzero(free)
            gradient = self.matrix[index] @ x + self.linear[index]
            # a whisper of ridge: dependent columns then take a long step, which a bound ends
            inner = self.matrix[np.ix_(index, index)] + 1e-13 * len(index) * np.eye(len(index))
            step = -cho_solve(cho_factor(inner, overwrite_a=True), gradient)
            room = np.where(step < 0, x[index], upper[index] - x[index])
            with np.errstate(divide="ignore", invalid="ignore"):
                length = np.where(step == 0, np.inf, room / np.abs(step))
            shortest = length.min()
            x[index] += min(1.0, shortest) * step
            if shortest > 1:
                return
            hit = length <= shortest
            x[index[hit]] = np.where(step[hit] < 0, 0, upper[index[hit]])
            free[index[hit]] = False


def _is_regular(matrix: Vector) -> bool:
    """Whether a Gram matrix of unit vectors has full rank in float64."""
    if not len(matrix):
        return True
    values = np.linalg.eigvalsh(matrix)
    return bool(values[0] > values[-1] * len(values) * np.finfo(np.float64).eps)
