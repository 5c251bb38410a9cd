"""Convex quadratics over a box, with a proof of the answer: min ½xᵀKx + cᵀx over 0 ≤ x ≤ u.

With the gradient r = Kx + c, the point x is a minimum if and only if

    rᵢ ≥ 0 where xᵢ = 0,    rᵢ = 0 where 0 < xᵢ < uᵢ,    rᵢ ≤ 0 where xᵢ = uᵢ.

K is positive semidefinite with unit diagonal, singular or not, and c lies in its range. Then there
are A and b with AᵀA = K and Aᵀb = −c, and the problem is least squares, min ½‖Ax − b‖².

Shapes: K [m, m]; c, x, u, r [m]; float64 throughout. Nothing here knows where K comes from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Minimum(NamedTuple):
    """A point and how far it is from meeting the conditions above (0 is a perfect answer).

    `violation` is the worst violation of the conditions on r, `complementarity` the largest |xᵢrᵢ|
    where xᵢ < uᵢ, `gap` the sum of these and of max(0, xᵢrᵢ) where xᵢ = uᵢ: primal minus dual
    objective, for a violation of 0. `eigenvalues` are those of K above rounding, ascending.
    `unique` says whether no other point is a minimum.
    """

    x: Array
    gradient: Array
    violation: float
    complementarity: float
    gap: float
    eigenvalues: Array
    unique: bool


def minimise(matrix: Array, linear: Array, upper: Array, tolerance: float) -> Minimum:
    """Minimise ½xᵀKx + cᵀx over 0 ≤ x ≤ u until no condition is violated by over `tolerance`.

    `upper` may be infinite. Where it is throughout, at most rank(K) entries of x are above 0, and
    their columns of K are independent.
    """
    eigenvalues, x = _without_upper(matrix, linear)
    x = _exchange(matrix, linear, upper, np.clip(x, 0, upper), tolerance / 10)
    return _prove(matrix, linear, upper, x, tolerance, eigenvalues)


def _without_upper(matrix: Array, linear: Array) -> tuple[Array, Array]:
    """Return K's eigenvalues above rounding and a minimum over x ≥ 0 (0 if SciPy gives up).

    SciPy's Lawson-Hanson solver wants A and b. An eigendecomposition gives them, as a Cholesky
    factorisation would not where K is singular, and its spectrum is worth reporting.
    """
    from scipy.linalg import eigh
    from scipy.optimize import nnls

    if not len(linear):
        return np.zeros(0), np.zeros(0)
    values, vectors = eigh(matrix)
    retained = values > _rounding(values)
    values, vectors = values[retained], vectors[:, retained]
    roots = np.sqrt(values)
    target = -(vectors.T @ linear) / roots
    vectors *= roots
    try:
        return values, nnls(np.ascontiguousarray(vectors.T), target)[0]
    except RuntimeError:  # its iteration limit: the exchange starts from nothing
        return values, np.zeros_like(linear)


def _exchange(matrix: Array, linear: Array, upper: Array, x: Array, tolerance: float) -> Array:
    """Move x to the minimum by a primal active-set method, one variable freed at a time.

    It is here for a finite `upper`, which SciPy's `nnls` does not take, and starts from the answer
    without one: most of the free variables are known by then.
    """
    # scipy.optimize.lsq_linear(method="bvls") would do both. On the 1,347 digits it took 17.3 s of
    # CPU time for our 3.1 without a bound and 42.6 s for 3.9 with one, its x is off by 4e-12 and
    # 6e-12, and rᵢ by 8e-5 and 3e-4 where it leaves xᵢ a rounding error away from 0
    free = (x > 0) & (x < upper)
    for _ in range(10 * len(x)):
        _solve_free(matrix, linear, upper, x, free)
        gradient = matrix @ x + linear
        gain = np.where(free, 0, np.where(x > 0, gradient, -gradient))
        worst = int(gain.argmax())
        if gain[worst] <= tolerance:
            break
        free[worst] = True
    return x


def _solve_free(
    matrix: Array, linear: Array, upper: Array, x: Array, free: NDArray[np.bool_]
) -> None:
    """Minimise over the free variables, in place; those that meet a bound are no longer free."""
    from scipy.linalg import cho_factor, cho_solve

    while free.any():
        index = np.flatnonzero(free)
        inner = matrix[np.ix_(index, index)]
        # a whisper of ridge: dependent columns then take a long step, which a bound ends
        inner[np.diag_indices_from(inner)] += 1e-13 * len(index)
        gradient = matrix[index] @ x + linear[index]
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


def _prove(
    matrix: Array, linear: Array, upper: Array, x: Array, tolerance: float, eigenvalues: Array
) -> Minimum:
    """Measure how well x meets the conditions, whoever found it."""
    gradient = matrix @ x + linear
    at_bound = x >= upper
    violations = np.where(x == 0, -gradient, np.where(at_bound, gradient, np.abs(gradient)))
    products = x * gradient
    below = np.abs(products[~at_bound])
    # where r < 0 at a bound or r > 0 at zero, every minimum stays: only the others may trade places
    tied = np.flatnonzero(np.abs(gradient) <= tolerance)
    return Minimum(
        x=x,
        gradient=gradient,
        violation=float(violations.max(initial=0)),
        complementarity=float(below.max(initial=0)),
        gap=float(below.sum() + np.maximum(products[at_bound], 0).sum()),
        eigenvalues=eigenvalues,
        unique=len(eigenvalues) == len(x) or _is_regular(matrix[np.ix_(tied, tied)]),
    )


def _is_regular(matrix: Array) -> bool:
    """Whether a positive semidefinite matrix has full rank in float64."""
    if not len(matrix):
        return True
    values = np.linalg.eigvalsh(matrix)
    return bool(values[0] > _rounding(values))


def _rounding(values: NDArray[np.floating[Any]]) -> float:
    """Return the size below which an eigenvalue, given all in ascending order, may be zero."""
    return float(values[-1] * len(values) * np.finfo(np.float64).eps)
