"""Convex quadratics over a box: known answers, SciPy's solvers, and proofs that can fail."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear, nnls

from dsvlib import _box_quadratic
from dsvlib._box_quadratic import minimise

FREE = np.full(12, np.inf)


def unit_columns(rows, columns, *, seed=0):
    """Return A with columns of length 1, and some b that A does not explain."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns)) + 0.5
    return matrix / np.linalg.norm(matrix, axis=0), rng.standard_normal(rows) + 1.0


def solve(matrix, target, upper, tolerance=1e-8):
    return minimise(matrix.T @ matrix, -matrix.T @ target, upper, tolerance)


def test_a_known_solution_is_found():
    matrix, _ = unit_columns(20, 12)
    known = np.maximum(np.arange(12) - 4.0, 0)
    answer = solve(matrix, matrix @ known, FREE)
    np.testing.assert_allclose(answer.x, known, atol=1e-12)
    np.testing.assert_allclose(answer.gradient, 0, atol=1e-12)
    assert max(answer.violation, answer.gap, answer.complementarity) < 1e-11
    assert answer.unique
    assert len(answer.eigenvalues) == 12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [8, 20], ids=["singular", "regular"])
def test_least_squares_without_bound_equals_scipy(rows, seed):
    matrix, target = unit_columns(rows, 12, seed=seed)
    answer = solve(matrix, target, FREE)
    expected, norm = nnls(matrix, target)
    np.testing.assert_allclose(np.linalg.norm(matrix @ answer.x - target), norm)
    if rows > 12:
        np.testing.assert_allclose(answer.x, expected, atol=1e-12)
    assert len(answer.eigenvalues) == min(rows, 12)
    assert (answer.x > 0).sum() <= len(answer.eigenvalues)
    assert max(answer.violation, answer.gap) < 1e-12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bound", [0.02, 0.2, 1.0])
def test_least_squares_in_a_box_equals_scipy(bound, seed):
    matrix, target = unit_columns(20, 12, seed=seed)
    upper = bound * np.linspace(0.5, 2, 12)
    answer = solve(matrix, target, upper)
    expected = lsq_linear(matrix, target, (0, upper), method="bvls", tol=1e-14).x
    np.testing.assert_allclose(answer.x, expected, atol=1e-9)
    assert (answer.x <= upper).all()
    assert max(answer.violation, answer.gap) < 1e-9


def test_equal_columns_have_many_solutions():
    matrix, _ = unit_columns(20, 6)
    twice = np.hstack([matrix, matrix])
    answer = solve(twice, matrix.sum(axis=1), FREE)
    assert not answer.unique
    assert len(answer.eigenvalues) == 6
    np.testing.assert_allclose(answer.x.reshape(2, 6).sum(axis=0), 1)
    boxed = solve(twice, matrix.sum(axis=1), np.full(12, 0.7))
    assert boxed.violation < 1e-9
    np.testing.assert_allclose(boxed.x.reshape(2, 6).sum(axis=0), 1)


def test_unique_although_the_matrix_is_singular():
    """Four columns in a plane, of which three lead away from what the other leaves over."""
    matrix = np.array([[0.0, 1.0, 0.6, 0.8], [1.0, 0.0, -0.8, -0.6]])
    answer = solve(matrix, np.array([-1.0, 1.0]), FREE[:4])
    np.testing.assert_allclose(answer.x, [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(answer.gradient, [0, 1, 0.6, 0.8], atol=1e-12)
    assert len(answer.eigenvalues) == 2
    assert answer.unique


def test_scipys_iteration_limit_is_no_dead_end(monkeypatch):
    def gives_up(*_):
        raise RuntimeError("Maximum number of iterations reached.")

    matrix, target = unit_columns(20, 12)
    expected = solve(matrix, target, FREE)
    monkeypatch.setattr("scipy.optimize.nnls", gives_up)
    answer = solve(matrix, target, FREE)
    np.testing.assert_allclose(answer.x, expected.x, atol=1e-8)
    assert answer.violation < 1e-8


@pytest.mark.parametrize("upper", [np.inf, 5.0])
def test_the_proof_sees_a_wrong_answer(monkeypatch, upper):
    matrix, target = unit_columns(20, 12)
    right = solve(matrix, target, np.full(12, upper))
    wrong = right.x + 0.1
    monkeypatch.setattr(_box_quadratic, "_exchange", lambda *args: wrong)
    answer = solve(matrix, target, np.full(12, upper))
    np.testing.assert_allclose(answer.gradient, matrix.T @ (matrix @ wrong - target))
    assert answer.violation == pytest.approx(np.abs(answer.gradient).max())
    assert answer.gap > answer.complementarity > 1e-3


def test_nothing_to_minimise():
    answer = minimise(np.zeros((0, 0)), np.zeros(0), np.zeros(0), 1e-8)
    assert answer.x.shape == (0,)
    assert answer.violation == answer.gap == answer.complementarity == 0
