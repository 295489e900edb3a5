"""The C++ solver beside its twin in numpy, which tries every face of the simplex."""

from __future__ import annotations

import numpy as np
import pytest

from raco_fast.solver import reference
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.rules.conflict_averse import RULES


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", range(1, 7))
def test_coefficients_of_independent_gradients(m: int, rule: str) -> None:
    rng = np.random.default_rng(m)
    for _ in range(10):
        G = rng.standard_normal((m, m + 2)) * 10.0 ** rng.uniform(-1, 1, (m, 1))
        M, w, c = G @ G.T, rng.dirichlet(np.ones(m)), float(rng.uniform(0.05, 0.95))
        M = (M + M.T) / 2
        found = solve_dual(M, w, c, rule)
        expected = reference.coefficients(M, w, c, rule)
        np.testing.assert_allclose(found.coefficients, expected, rtol=1e-9, atol=1e-10)
        if rule not in ("linear", "mgda") and m > 1:
            p = reference.minimiser(M, w, c, rule)
            value = p @ M @ w + c * reference.norm(M, w) * reference.norm(M, p)
            assert value == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize("rule", ["cagrad", "mgda"])
def test_the_value_where_gradients_are_dependent(rule: str) -> None:
    """The minimiser is not unique there, its value is."""
    rng = np.random.default_rng(5)
    for trial in range(60):
        G = rng.integers(-2, 3, (5, 1 + trial % 3)).astype(float)
        M, w, c = G @ G.T, rng.dirichlet(np.ones(5)), 0.4
        p, mgda = reference.minimiser(M, w, c, rule), rule == "mgda"
        s = 1.0 if mgda else c * reference.norm(M, w)
        value = (0.0 if mgda else p @ M @ w) + s * reference.norm(M, p)
        assert value == pytest.approx(solve_dual(M, w, c, rule).value, abs=1e-12 * M.max())


def test_no_correction_without_a_direction() -> None:
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    for w in ([0.5, 0.5], [0.6, 0.4]):
        expected = solve_dual(opposite, w, 0.4).coefficients
        np.testing.assert_allclose(reference.coefficients(opposite, np.array(w), 0.4), expected)
