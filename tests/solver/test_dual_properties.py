"""What the dual problem promises (docs/method.md), as properties of `solve_dual`."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from raco_fast.solver.dual import solve_dual
from raco_fast.solver.rules.conflict_averse import RULES

DUAL_RULES = ("cagrad", "cagrad-clip", "mgda")


@st.composite
def gradient_sets(draw: Any, min_m: int = 2, max_m: int = 8) -> np.ndarray:
    """[m, d] gradients: generic, dependent, repeated, opposed, zero, over six decades."""
    m = draw(st.integers(min_m, max_m))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(
        st.sampled_from(
            ["generic", "low rank", "integers", "repeated", "opposed", "zero", "decades"]
        )
    )
    d = draw(st.integers(1, 3)) if kind in ("low rank", "integers") else m + 3
    G = rng.standard_normal((m, d))
    if kind == "integers":
        G = rng.integers(-2, 3, (m, d)).astype(float)
    elif kind == "repeated":
        G = G[rng.integers(0, max(1, m // 2), m)]
    elif kind == "opposed":
        G[m - 1] = -2.0 * G[0]
    elif kind == "zero":
        G[m - 1] = 0.0
    elif kind == "decades":
        G *= 10.0 ** rng.uniform(-3, 3, (m, 1))
    return G


@st.composite
def weight_vectors(draw: Any, m: int) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.dirichlet(np.ones(m))
    if m > 2 and draw(st.booleans()):
        w[rng.integers(m)] = 0.0
        w /= w.sum()
    return w


@st.composite
def problems(draw: Any, **limits: int) -> tuple[np.ndarray, np.ndarray, float]:
    G = draw(gradient_sets(**limits))
    return G, draw(weight_vectors(len(G))), draw(st.floats(0.05, 0.95))


def exact_gram(G: np.ndarray) -> np.ndarray:
    """Symmetric to the bit, and the same for every order of the objectives."""
    return np.array([[np.dot(a, b) for b in G] for a in G])


@given(problems(), st.sampled_from(RULES), st.integers(-49, 49))
def test_scale_by_power_of_four_changes_no_bit(problem: Any, rule: str, k: int) -> None:
    G, w, c = problem
    M = exact_gram(G)
    a, b = solve_dual(M, w, c, rule), solve_dual(M * 4.0**k, w, c, rule)
    np.testing.assert_array_equal(a.p, b.p)
    np.testing.assert_array_equal(a.coefficients, b.coefficients)
    assert b.g0_norm == a.g0_norm * 2.0**k
    assert b.value == a.value * (2.0**k if rule == "mgda" else 4.0**k)


@given(st.data(), st.sampled_from(RULES), st.floats(-30, 30))
def test_scale_from_1e_minus_30_to_1e30(data: Any, rule: str, exponent: float) -> None:
    m = data.draw(st.integers(2, 8))
    G = np.random.default_rng(data.draw(st.integers(0, 2**32))).standard_normal((m, m + 3))
    w, c = data.draw(weight_vectors(m)), data.draw(st.floats(0.05, 0.95))
    M = exact_gram(G)
    a, b = solve_dual(M, w, c, rule), solve_dual(M * 10.0**exponent, w, c, rule)
    np.testing.assert_allclose(b.p, a.p, rtol=0, atol=1e-11)
    np.testing.assert_allclose(b.coefficients, a.coefficients, rtol=1e-10, atol=1e-12)


@given(problems(), st.sampled_from(DUAL_RULES), st.randoms(use_true_random=False))
def test_permuting_objectives_permutes_the_result(problem: Any, rule: str, random: Any) -> None:
    G, w, c = problem
    order = list(range(len(G)))
    random.shuffle(order)
    a = solve_dual(exact_gram(G), w, c, rule)
    b = solve_dual(exact_gram(G[order]), w[order], c, rule)
    np.testing.assert_allclose(b.p, a.p[order], rtol=0, atol=1e-9)


@given(problems(), st.sampled_from(DUAL_RULES), st.integers(0, 2**32 - 1))
def test_no_minimiser_is_closer_to_the_weights(problem: Any, rule: str, seed: int) -> None:
    """KKT of the projection: no feasible null direction d has (w - p)'d > 0."""
    G, w, c = problem
    p = solve_dual(exact_gram(G), w, c, rule).p
    constraints = (
        np.vstack([np.ones(len(G)), (G / np.abs(G).max()).T]) if G.any() else np.ones((1, len(G)))
    )
    _, sizes, rows = np.linalg.svd(constraints)
    null = rows[np.count_nonzero(sizes > 1e-9 * sizes[0]) :]
    assume(len(null) > 0)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        d = rng.standard_normal(len(null)) @ null
        if p[d < -1e-9].min(initial=1.0) < 1e-9:
            continue  # leaves the simplex at once
        assert (w - p) @ d <= 1e-7 * np.linalg.norm(d)


@given(st.integers(2, 16), st.data(), st.sampled_from(DUAL_RULES))
def test_identical_gradients_give_the_weights(m: int, data: Any, rule: str) -> None:
    w = data.draw(weight_vectors(m))
    g = np.random.default_rng(m).standard_normal(5)
    solution = solve_dual(exact_gram(np.tile(g, (m, 1))), w, 0.4, rule)
    np.testing.assert_array_equal(solution.p, w)
    assert not solution.clip_active


@given(st.integers(2, 8), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
def test_g0_zero_gives_the_weights_and_no_correction(m: int, c: float, seed: int) -> None:
    g = np.random.default_rng(seed).standard_normal((m, 4))
    G = np.vstack([g, -g])
    w = np.full(2 * m, 0.5 / m)
    for rule in RULES:
        solution = solve_dual(exact_gram(G), w, c, rule)
        np.testing.assert_array_equal(solution.p, w)
        np.testing.assert_array_equal(solution.coefficients, w)
        assert solution.g0_norm == solution.update_norm == solution.gap == 0.0


@given(problems(), st.sampled_from(RULES), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_non_finite_gram_is_reported_and_gives_nan(problem: Any, rule: str, bad: float) -> None:
    G, w, c = problem
    M = exact_gram(G)
    M[0, 1] = M[1, 0] = bad
    solution = solve_dual(M, w, c, rule)
    assert not solution.finite
    assert np.isnan(solution.p).all()
    assert np.isnan(solution.coefficients).all()
    assert solve_dual(exact_gram(G), w, c, rule).finite


@given(problems(min_m=1, max_m=12))
def test_clip_and_norm_identities(problem: Any) -> None:
    """p_clipped = min(p, w); ||G0 - g0|| = c ||g0||; <G0, g0> >= (1 - c) ||g0||^2."""
    G, w, c = problem
    for rule in ("cagrad", "cagrad-clip"):
        solution = solve_dual(exact_gram(G), w, c, rule)
        p, alpha = solution.p, solution.coefficients
        expected = np.minimum(p, w) if rule == "cagrad-clip" else p
        np.testing.assert_array_equal(solution.p_clipped, expected)
        kept = expected[p > 0.0] / p[p > 0.0]
        assert solution.clip_active == (np.ptp(kept) > 1e-12 * kept.max())
        assert p.min() >= 0.0
        assert abs(p.sum() - 1.0) <= 1e-12
        assert (solution.p_clipped[w == 0.0] == 0.0).all() or rule == "cagrad"
        g0, G0 = w @ G, alpha @ G
        size = np.abs(alpha) @ np.linalg.norm(G, axis=1)
        if solution.gp_norm == 0.0:
            np.testing.assert_array_equal(alpha, w)
        else:
            radius = c * np.linalg.norm(g0)
            # G p_clipped is known to rounding of its terms, and is stretched to the radius.
            terms = solution.p_clipped @ np.linalg.norm(G, axis=1)
            slack = 1e-12 * size + radius * 1e-14 * (terms / solution.gp_norm) ** 2
            assert abs(np.linalg.norm(G0 - g0) - radius) <= slack
            assert abs(np.linalg.norm(G0) - solution.update_norm) <= slack
        assert G0 @ g0 >= (1.0 - c) * g0 @ g0 - 1e-12 * size * np.linalg.norm(g0)


@given(problems(), st.sampled_from(["cagrad", "cagrad-clip"]))
def test_c_zero_gives_the_weights(problem: Any, rule: str) -> None:
    G, w, _ = problem
    np.testing.assert_array_equal(solve_dual(exact_gram(G), w, 0.0, rule).coefficients, w)


@given(problems(min_m=2, max_m=2))
@example((np.array([[1.0, 0.0], [3.0, 1.0]]), np.array([0.6, 0.4]), 0.4))
def test_two_objectives_at_a_vertex_are_not_changed_by_clipping(problem: Any) -> None:
    """p~ = w_i e_i points along p = e_i, and only its direction matters."""
    G, w, c = problem
    a = solve_dual(exact_gram(G), w, c, "cagrad")
    b = solve_dual(exact_gram(G), w, c, "cagrad-clip")
    assume(a.p.max() == 1.0 and b.gp_norm > 0.0)
    assert not b.clip_active
    np.testing.assert_allclose(b.coefficients, a.coefficients, rtol=1e-13)


@pytest.mark.parametrize("kappa", [1e-30, 1e-12, 1.0, 7.0, 1e30])
def test_witness(kappa: float) -> None:
    solution = solve_dual(kappa * np.array([[17.0, -5.0], [-5.0, 2.0]]), [0.2, 0.8], 0.5)
    assert solution.p[0] == pytest.approx(0.356145, abs=5e-7)
    assert solution.clip_active


def test_linear_and_mgda_are_what_they_say() -> None:
    M = torch.tensor([[17.0, -5.0], [-5.0, 2.0]], dtype=torch.float64)
    linear, mgda = solve_dual(M, [0.2, 0.8], 0.5, "linear"), solve_dual(M, [0.2, 0.8], 0.5, "mgda")
    assert torch.equal(linear.coefficients, torch.tensor([0.2, 0.8], dtype=torch.float64))
    assert torch.equal(linear.p, linear.coefficients)
    assert linear.gap == 0.0
    # min over t of ||t g1 + (1 - t) g2||: t = (M22 - M12) / (M11 - 2 M12 + M22) = 7 / 29
    assert mgda.coefficients[0].item() == pytest.approx(7 / 29, rel=1e-15)
    assert mgda.update_norm == mgda.value == pytest.approx((9 / 29) ** 0.5, rel=1e-14)


def test_three_gradients_in_every_order() -> None:
    """p = (t, t, 1 - 2t) by symmetry; t from f'(t) = 0 by bisection, no Gram involved."""
    G = np.array([[1.0, 0.0], [1.0, 0.0], [-1.2, 0.8]])
    w = np.array([0.3, 0.3, 0.4])
    g0 = w @ G
    low, high = 0.0, 0.5
    for _ in range(60):
        t = 0.5 * (low + high)
        u, du = np.array([t, t, 1.0 - 2.0 * t]) @ G, np.array([1.0, 1.0, -2.0]) @ G
        slope = g0 @ du + 0.4 * np.linalg.norm(g0) * (u @ du) / np.linalg.norm(u)
        low, high = (low, t) if slope > 0.0 else (t, high)
    assert 0.01 < low < 0.3  # interior, and clipping acts on the third
    for order in map(list, permutations(range(3))):
        solution = solve_dual(exact_gram(G[order]), w[order], 0.4)
        expected = np.array([low, low, 1.0 - 2.0 * low])[order]
        np.testing.assert_allclose(solution.p, expected, rtol=1e-12)
        assert solution.clip_active


@pytest.mark.parametrize("rule", DUAL_RULES)
def test_a_null_space_is_searched_not_guessed(rule: str) -> None:
    """Four gradients at the corners of a square: p* = w - t (1, -1, 1, -1), clamped at 0."""
    G = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]) + np.array([0.0, 3.0])
    w = np.array([0.05, 0.5, 0.05, 0.4])
    p = solve_dual(exact_gram(G), w, 0.4, rule).p
    assert p[0] == pytest.approx(p[2], abs=1e-13)
    assert p @ G == pytest.approx(
        np.array([0.0, 2.0]), abs=1e-13
    )  # the shortest point, at vertex 3
