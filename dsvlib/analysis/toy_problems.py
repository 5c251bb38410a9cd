"""Problems in the plane, small enough to solve to rounding and to draw.

A separable cloud, three clouds, two moons; the linear models that scikit-learn and SciPy fit to
them; a tanh network, Newton's method to a stationary point of its regularised loss, and a count of
the units that are really different. Everything is float64, so that "the residual is zero" can mean
1e-12.

Shapes: inputs [n, 2] (the linear models take any [n, d]), labels int64 [n].
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

from dsvlib._validation import check_count, check_number
from dsvlib.classifiers.training import Labelled
from dsvlib.frozen import evaluation_mode
from dsvlib.support_set import SupportSet


def separable(count: int, *, generator: torch.Generator, gap: float = 0.3) -> SupportSet:
    """Return `count` points with an empty corridor of half-width `gap` around a tilted line.

    The line misses the origin, so that a support vector machine needs its bias. All points lie in
    the square |x| ≤ 3, so that a picture need not make room for one far away.
    """
    if not 0 <= gap <= 2:  # beyond, hardly a draw falls into both the square and a class
        raise ValueError(f"gap: expected a number from 0 to 2, got {gap}")
    inputs, heights = torch.empty(0, 2).double(), torch.empty(0).double()
    while len(inputs) < count:
        draw = 1.2 * torch.randn(4 * count, 2, generator=generator, dtype=torch.float64)
        height = draw @ draw.new_tensor([0.8, 0.6]) - 0.2
        kept = (height.abs() > gap) & (draw.abs().amax(1) <= 3)
        inputs, heights = torch.cat([inputs, draw[kept]]), torch.cat([heights, height[kept]])
    return _set(inputs[:count], (heights[:count] > 0).long())


def three_clouds(count: int, *, generator: torch.Generator, spread: float = 0.45) -> SupportSet:
    """Return `count` points in three Gaussian clouds around the origin, classes 0, 1 and 2."""
    labels = torch.arange(count) % 3
    angle = 2 * torch.pi * (labels.double() / 3 + 0.25)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return _set(1.6 * torch.stack([angle.cos(), angle.sin()], dim=1) + spread * noise, labels)


def two_moons(count: int, *, generator: torch.Generator, noise: float = 0.15) -> SupportSet:
    """Return `count` points on two interleaved half circles with noise, about standardised."""
    labels = torch.arange(count) % 2
    angle = torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    sign = 1.0 - 2.0 * labels.double()
    arc = torch.stack([sign * (angle.cos() - 0.5), sign * (angle.sin() - 0.25)], dim=1)
    jitter = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    # fixed numbers and not this sample's own: training and test points share one frame
    return _set((arc + noise * jitter) / arc.new_tensor([0.89, 0.54]), labels)


def _set(inputs: Tensor, labels: Tensor) -> SupportSet:
    return SupportSet(inputs, labels, torch.ones(len(inputs)).double())


def linear_layer(weight: np.ndarray | Tensor, bias: np.ndarray | Tensor | None = None) -> nn.Linear:
    """Return the float64 layer x ↦ Wx + b with a given W [K, d] and b [K] (None: without)."""
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [K, d], got {list(weight.shape)}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(torch.asarray(weight, copy=True))
        if bias is not None:
            layer.bias.copy_(torch.asarray(bias, copy=True))
    return layer


def hard_margin_svm(inputs: Tensor, labels: Tensor) -> tuple[nn.Linear, Tensor]:
    """Return f(x) = w·x + b [1, d], [1] of the hard-margin SVM and its multipliers α [n].

    min ½‖w‖² with yᵢf(xᵢ) ≥ 1, y = 2·label − 1, by scikit-learn's `SVC`, which solves the dual.
    Raises ValueError where no line separates the classes.
    """
    from sklearn.svm import SVC

    signs = _signs(labels)
    svm = SVC(kernel="linear", C=1e8, tol=1e-10).fit(inputs.numpy(), labels.numpy())
    multipliers = torch.zeros(len(inputs), dtype=torch.float64)
    multipliers[svm.support_.tolist()] = torch.tensor(svm.dual_coef_[0]).abs()
    layer = linear_layer(svm.coef_, svm.intercept_)
    lowest = float((signs * layer(inputs).detach()[:, 0]).min())
    if lowest < 1 - 1e-3:
        raise ValueError(
            f"inputs: expected classes that a line separates, got a point at height {lowest:.3g} "
            f"instead of 1; give each sample a private feature"
        )
    return layer, multipliers


def primal_svm(inputs: Tensor, labels: Tensor) -> nn.Linear:
    """Return f(x) = w·x + b of the hard-margin SVM from its primal problem, by SciPy's SLSQP.

    It never sees a multiplier: a check of `hard_margin_svm` that is not circular.
    """
    from scipy.optimize import minimize

    points = inputs.double().numpy()
    heights = np.c_[points, np.ones(len(points))] * _signs(labels).numpy()[:, None]  # · (w, b) = yf
    feasible = {"type": "ineq", "fun": lambda v: heights @ v - 1, "jac": lambda _: heights}
    found = minimize(
        lambda v: v[:-1] @ v[:-1] / 2,
        np.r_[np.ones(points.shape[1]), 0.0],
        jac=lambda v: np.r_[v[:-1], 0.0],
        constraints=[feasible],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return linear_layer(found.x[None, :-1], found.x[-1:])


def logistic_regression(
    inputs: Tensor, labels: Tensor, strength: float = 1.0, *, bias: bool = False
) -> nn.Linear:
    """Return the minimiser W of ½‖W‖² + C Σ Lᵢ with C = `strength`, by scikit-learn.

    W is [1, d], a score for class 1, where there are two classes, else [K, d]. The bias, if there
    is one, is not penalised.
    """
    from sklearn.linear_model import LogisticRegression

    check_number("strength", strength, above=0)
    solver = "newton-cholesky" if len(labels.unique()) == 2 else "lbfgs"
    options = {"fit_intercept": bias, "tol": 1e-12, "max_iter": 10_000, "solver": solver}
    fit = LogisticRegression(C=strength, **options).fit(inputs.numpy(), labels.numpy())
    return linear_layer(fit.coef_, fit.intercept_ if bias else None)


def _signs(labels: Tensor) -> Tensor:
    """Return y = −1 or +1 of classes 0 and 1, float64 [n]."""
    if set(labels.unique().tolist()) != {0, 1}:
        raise ValueError(f"labels: expected classes 0 and 1, got {labels.unique().tolist()}")
    return 2 * labels.double() - 1


def grid_scores(model: nn.Module, box: float, *, side: int = 201) -> Tensor:
    """Return the model's scores on an even grid over |x| ≤ `box`, [side, side, K], x₁ first."""
    check_number("box", box, above=0)
    check_count("side", side, at_least=2)
    ticks = torch.linspace(-box, box, side, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.cartesian_prod(ticks, ticks)).reshape(side, side, -1)


def fraction_near(inputs: Tensor, labels: Tensor, data: Labelled, *, radius: float) -> float:
    """Return the fraction of points [m, d] within `radius` of a sample of `data` of their class."""
    check_number("radius", radius, at_least=0)
    distance = torch.cdist(inputs, data.inputs)
    distance[labels[:, None] != data.labels] = torch.inf
    return float((distance.amin(1) <= radius).double().mean())


def tanh_network(units: int, classes: int = 2, *, generator: torch.Generator) -> nn.Sequential:
    """Return an untrained network 2 → `units` tanh → `classes` logits in float64."""
    first, second = nn.Linear(2, units).double(), nn.Linear(units, classes).double()
    with torch.no_grad():
        for layer in (first, second):
            bound = layer.in_features**-0.5
            for value in (layer.weight, layer.bias):
                drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(bound * (2 * drawn - 1))
    return nn.Sequential(first, nn.Tanh(), second)


def newton(
    model: nn.Module,
    data: Labelled,
    *,
    weight_decay: float,
    steps: int = 60,
    tolerance: float = 1e-13,
) -> float:
    """Move `model` to a stationary point of (1/n) Σ Lᵢ + (w/2)‖θ‖²; return the gradient's norm.

    Newton steps with the absolute eigenvalues of the Hessian [P, P] (so that a saddle repels) and
    step halving: for smooth networks of a few hundred parameters.
    """
    check_number("weight_decay", weight_decay, above=0)
    names = dict(model.named_parameters())
    sizes = [value.numel() for value in names.values()]

    def objective(flat: Tensor) -> Tensor:
        pieces = zip(names.items(), flat.split(sizes), strict=True)
        theta = {name: piece.view_as(value) for (name, value), piece in pieces}
        losses = F.cross_entropy(functional_call(model, theta, (data.inputs,)), data.labels)
        return losses + weight_decay / 2 * (flat @ flat)

    flat = nn.utils.parameters_to_vector(names.values()).detach()
    with evaluation_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.func's own use of torch.jit
        for _ in range(steps):
            slope = grad(objective)(flat)
            if slope.norm() < tolerance:
                break
            curvature, basis = torch.linalg.eigh(hessian(objective)(flat))
            step = basis @ (basis.T @ slope / curvature.abs().clamp(min=weight_decay / 10))
            size, value = 1.0, objective(flat)
            while objective(flat - size * step) > value and size > 1e-6:
                size /= 2
            flat = flat - size * step
        left = float(grad(objective)(flat).norm())
    with torch.no_grad():
        nn.utils.vector_to_parameters(flat, names.values())
    return left


def distinct_units(model: nn.Sequential, *, tolerance: float = 1e-4) -> int:
    """Return how many hidden units of a `tanh_network` differ in (a, c) of tanh(a·x + c).

    A unit and its mirror image (−a, −c) are one, since tanh is odd; a unit at zero counts for none.
    """
    first = model[0]
    if not isinstance(first, nn.Linear) or first.bias is None:
        raise ValueError(
            f"model: expected a tanh_network, got one that begins with {type(first).__name__}; "
            f"the units are read from its first linear layer"
        )
    rows = torch.cat([first.weight, first.bias[:, None]], dim=1).detach()
    pivot = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    rows = (rows * pivot.sign())[rows.norm(dim=1) > tolerance]
    seen: list[Tensor] = []
    for row in rows:
        if all((row - other).norm() > tolerance * row.norm() for other in seen):
            seen.append(row)
    return len(seen)
