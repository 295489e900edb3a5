"""100,000 random and adversarial Grams: no failure, relative duality gap <= 1e-10.

The relative gap of these tests is

    gap / (||g0|| max_i ||g_i||)      (mgda: gap / max_i ||g_i||),

because f(p) = <g0, Gp> + s ||Gp|| moves by at most (1 + c) ||g0|| ||g_i|| when weight moves to i.
The solver's own gap is not taken on trust: `gap_from_gradients` rebuilds it from p and the
gradients themselves, `test_certificate_in_50_digits` from p and the Gram.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
from gradient_families import FAMILIES, opposite
from scipy.optimize import nnls

from raco_fast.solver.dual import solve_dual
from raco_fast.solver.solution import DualSolution

PER_CASE = 270  # 270 Grams x 12 families x 31 sizes = 100,440
BOUND = 1e-10


def draw_weights(rng: Any, m: int) -> np.ndarray:
    kind = rng.integers(4)
    if kind == 0:
        return np.full(m, 1.0 / m)
    w = rng.dirichlet(np.full(m, 0.3 if kind == 1 else 1.0))
    if kind == 2 and m > 2:
        w[rng.integers(m)] = 0.0
        w /= w.sum()
    return w


def draw(seed: int, make: Any, m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """n gradient sets [n, m, d], their Grams, and one (w, c) for all of them."""
    rng = np.random.default_rng([seed, m, FAMILIES.index(make)])
    G = make(rng.standard_normal((n, m, int(rng.integers(m, m + 12)) + 1)), rng)
    M = G @ G.swapaxes(1, 2)
    c = float(rng.choice([0.05, 0.4, 0.9, 0.99]))
    return G, (M + M.swapaxes(1, 2)) / 2, draw_weights(rng, m), c


def relative_gap(solution: DualSolution) -> np.ndarray:
    lengths = np.sqrt(np.einsum("nii->ni", solution.gram)).max(1)
    scale = lengths * (1.0 if solution.rule == "mgda" else solution.g0_norm)
    return np.divide(solution.gap, scale, out=np.array(solution.gap), where=scale > 0.0)


def gap_from_gradients(
    G: np.ndarray, w: np.ndarray, c: float, solution: DualSolution
) -> tuple[np.ndarray, np.ndarray]:
    """(relative gap, ||u|| / its terms) with u = Gp formed explicitly: no Gram, no cancellation."""
    p, mgda = solution.p, solution.rule == "mgda"
    lengths = np.linalg.norm(G, axis=2)
    g0 = np.zeros_like(G[:, 0]) if mgda else np.einsum("m,nmd->nd", w, G)
    s = np.ones(len(G)) if mgda else c * np.linalg.norm(g0, axis=1)
    u = np.einsum("nm,nmd->nd", p, G)
    size = np.linalg.norm(u, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.einsum("nmd,nd->nm", G, g0 + (s / size)[:, None] * u)
        f = np.einsum("nd,nd->n", g0, u) + s * size
        scale = lengths.max(1) * (1.0 if mgda else np.linalg.norm(g0, axis=1))
        return (f - y.min(1)) / scale, size / (p * lengths).sum(1)


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_every_gap_is_closed(make: Any) -> None:
    rebuilt = 0
    for m in range(2, 33):
        G, M, w, c = draw(1, make, m, PER_CASE)
        rule = ("cagrad", "cagrad-clip", "mgda")[m % 3]
        solution = solve_dual(M, w, c, rule)
        assert solution.finite.all()
        assert solution.converged.all()
        assert relative_gap(solution).max() <= BOUND
        assert solution.p.min() >= 0.0
        assert abs(solution.p.sum(1) - 1.0).max() <= 1e-12
        gap, conditioning = gap_from_gradients(G, w, c, solution)
        # The Gram holds ||g0|| and ||Gp|| to half the digits of their terms.
        g0_known = solution.g0_norm > 1e-3 * (w @ np.sqrt(np.einsum("nii->in", M)))
        known = (conditioning > 1e-3) & (g0_known | (rule == "mgda"))
        assert gap[known].max(initial=0.0) <= BOUND
        rebuilt += int(known.sum())
    assert rebuilt > PER_CASE  # the independent check did run in this family


def test_kinks_are_optimal_by_nonnegative_least_squares() -> None:
    """Gp = 0 is optimal exactly when some u, ||u|| <= s, has <g_i, g0 + u> >= 0 for all i.

    The shortest such u is G'x, x = argmin over x >= 0 of ||G'x + g0||: Lawson and Hanson's NNLS.
    """
    kinks = 0
    for m in range(3, 17):
        G, M, w, c = draw(2, opposite, m, 30)
        solution = solve_dual(M, w, c, "cagrad")
        for k in np.flatnonzero(abs(solution.value) < 1e-12 * solution.g0_norm**2):
            g0 = w @ G[k]
            x, _ = nnls(G[k].T, -g0)
            assert np.linalg.norm(x @ G[k]) <= c * np.linalg.norm(g0) * (1 + 1e-9)
            kinks += 1
    assert kinks > 20


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_certificate_in_50_digits(make: Any) -> None:
    """The paper's formula (Algorithm 1), from p as returned and the Gram at face value."""
    for m in (3, 5, 9, 14):
        _, M, w, c = draw(3, make, m, 4)
        for gram in M:
            solution = solve_dual(gram, w, c, "cagrad")
            with mpmath.workdps(50):
                A, p = mpmath.matrix(gram.tolist()), mpmath.matrix(solution.p.tolist())
                b = A * mpmath.matrix(w.tolist())
                square = (p.T * A * p)[0]
                terms = float(solution.p @ np.sqrt(np.diag(gram)))
                if square <= 1e-6 * terms**2:
                    continue  # a kink, or too close to one for float64 data: tested above
                s = c * mpmath.sqrt(abs((mpmath.matrix(w.tolist()).T * b)[0]))
                size = mpmath.sqrt(square)
                y, f = b + (s / size) * (A * p), (b.T * p)[0] + s * size
                scale = solution.g0_norm * np.sqrt(np.diag(gram)).max()
                assert f - min(y) <= BOUND * scale
                assert abs(f - solution.value) <= 1e-14 * scale


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_million_more(seed: int) -> None:
    for make in FAMILIES:
        for m in range(2, 33):
            _, M, w, c = draw(seed, make, m, PER_CASE)
            solution = solve_dual(M, w, c, ("cagrad", "cagrad-clip", "mgda")[seed % 3])
            assert solution.converged.all()
            assert relative_gap(solution).max() <= BOUND, (make.__name__, m)
