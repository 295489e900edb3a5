"""The clips of our own, "inside" the dual and "smooth", beside independent truths in float64."""

from __future__ import annotations

from typing import Any

import gradient_families as families
import mpmath
import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from raco_fast import _C
from raco_fast.solver import on_device, reference
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.registry import check_rule, label_of, spec_of
from raco_fast.solver.solution import DualSolution

KAPPAS = (1.0, 1.01, 1.5, 3.0, 20.0)


def inside(kappa: float) -> dict[str, Any]:
    return {"name": "cagrad-clip", "clip": "inside", "kappa": kappa}


def smooth(q: float) -> dict[str, Any]:
    return {"name": "cagrad-clip", "clip": "smooth", "q": q}


def exact_gram(G: np.ndarray) -> np.ndarray:
    return np.array([[np.dot(a, b) for b in G] for a in G])


def value_of(M: np.ndarray, w: np.ndarray, c: float, p: np.ndarray) -> float:
    return float(p @ M @ w + c * reference.norm(M, w) * reference.norm(M, p))


@pytest.mark.parametrize(
    "m", [*range(1, 7), *(pytest.param(m, marks=pytest.mark.slow) for m in (7, 8))]
)
def test_inside_is_the_best_of_all_faces(m: int) -> None:
    """Every split into free, empty and full caps is tried, to m = 8."""
    rng = np.random.default_rng(m)
    active = 0
    for trial in range({6: 4, 8: 3}.get(m, 10)):
        G = rng.standard_normal((m, m + 2)) * 10.0 ** rng.uniform(-1, 1, (m, 1))
        M, w, c = exact_gram(G), rng.dirichlet(np.ones(m)), float(rng.uniform(0.05, 0.95))
        kappa = KAPPAS[trial % len(KAPPAS)]
        found = solve_dual(M, w, c, inside(kappa))
        p = reference.minimiser(M, w, c, "cagrad", kappa)
        expected = reference.coefficients(M, w, c, "cagrad-clip", "inside", kappa)
        np.testing.assert_allclose(found.p, p, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.coefficients, expected, rtol=1e-8, atol=1e-9)
        np.testing.assert_array_equal(found.p_clipped, found.p)
        lower = solve_dual(M, w, c, "cagrad").value
        assert found.clip_active == (found.value > lower + 1e-12 * found.g0_norm**2)
        active += found.clip_active
    assert m < 2 or active


TAME = (
    families.low_rank,
    families.repeated,
    families.opposite,
    families.zero_gradient,
    families.common_component,
    families.small_integers,
)


@pytest.mark.parametrize("make", TAME, ids=lambda make: make.__name__)
@pytest.mark.parametrize("m", [2, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_inside_has_the_update_of_the_best_of_all_faces(make: Any, m: int) -> None:
    """Where p is not unique, Gp is, and with it the update: to 1e-7 of its terms, at any scale."""
    rng = np.random.default_rng([m, families.FAMILIES.index(make)])
    for trial in range(5):
        G = make(rng.standard_normal((1, m, m + 3)), rng)[0] * 10.0 ** rng.uniform(-6, 6)
        M, w, kappa = exact_gram(G), rng.dirichlet(np.ones(m)), KAPPAS[trial]
        found = solve_dual(M, w, 0.4, inside(kappa)).coefficients
        expected = reference.coefficients(M, w, 0.4, "cagrad-clip", "inside", kappa)
        terms = (found + expected) @ np.linalg.norm(G, axis=1)
        assert np.linalg.norm((found - expected) @ G) <= 1e-7 * terms


@pytest.mark.parametrize("m", [4, 8, 16])
def test_slsqp_finds_nothing_lower_inside(m: int) -> None:
    rng = np.random.default_rng(m)
    for kappa in (1.3, 2.5):
        M, w, c = exact_gram(rng.standard_normal((m, m + 4))), rng.dirichlet(np.ones(m)), 0.6
        b, s = M @ w, c * np.sqrt(w @ M @ w)
        found = solve_dual(M, w, c, inside(kappa))
        best = minimize(
            lambda p, b=b, s=s, M=M: b @ p + s * np.sqrt(p @ M @ p),
            w,
            jac=lambda p, b=b, s=s, M=M: b + s * (M @ p) / np.sqrt(p @ M @ p),
            bounds=[(0.0, min(1.0, kappa * x)) for x in w],
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1.0, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        ).fun
        assert found.value <= best + 1e-12 * found.g0_norm**2
        assert best <= found.value + 1e-6 * found.g0_norm**2


def rebuilt_gaps(
    G: np.ndarray, w: np.ndarray, c: float, kappa: float, solution: DualSolution
) -> tuple[np.ndarray, np.ndarray]:
    """(relative gap, ‖Gp‖ / its terms) from p and the gradients: no Gram, no solver."""
    lengths, p = np.linalg.norm(G, axis=2), solution.p
    g0, u = np.einsum("m,nmd->nd", w, G), np.einsum("nm,nmd->nd", p, G)
    s, size = c * np.linalg.norm(g0, axis=1), np.linalg.norm(u, axis=1)
    y = np.einsum("nmd,nd->nm", G, g0 + (s / size)[:, None] * u)
    order = np.argsort(y, axis=1)
    full = np.cumsum(np.minimum(kappa * w, 1.0)[order], axis=1)
    share = np.diff(np.minimum(full, 1.0), axis=1, prepend=0.0)
    lower = (share * np.take_along_axis(y, order, 1)).sum(1)
    f = np.einsum("nd,nd->n", g0, u) + s * size
    return (f - lower) / (lengths.max(1) * np.linalg.norm(g0, axis=1)), size / (p * lengths).sum(1)


@pytest.mark.parametrize("make", families.FAMILIES, ids=lambda make: make.__name__)
def test_inside_closes_every_gap(make: Any) -> None:
    """To m = 32, dependent, opposed, repeated, zero, over twelve decades."""
    rebuilt, active = 0, 0
    for m in range(2, 33, 3):
        rng = np.random.default_rng([m, families.FAMILIES.index(make)])
        G = make(rng.standard_normal((20, m, m + 8)), rng)
        M = G @ G.swapaxes(1, 2)
        M, w = (M + M.swapaxes(1, 2)) / 2, rng.dirichlet(np.ones(m))
        lengths = np.sqrt(np.einsum("nii->ni", M)).max(1)
        for kappa, c in zip(KAPPAS, (0.4, 0.05, 0.9, 0.99, 0.4), strict=True):
            rule = inside(kappa)
            found = solve_dual(M, w, c, rule)
            scale = lengths * found.g0_norm
            assert found.converged.all()
            assert (found.gap <= 1e-10 * scale).all()
            assert found.p.min() >= 0.0
            assert (found.p <= kappa * w).all()
            assert abs(found.p.sum(1) - 1.0).max() <= 1e-12
            known = found.gp_norm > 1e-3 * (found.p * np.sqrt(np.einsum("nii->ni", M))).sum(1)
            known &= found.g0_norm > 1e-3 * (w @ np.sqrt(np.einsum("nii->in", M)))
            gaps, size = rebuilt_gaps(G[known], w, c, kappa, solve_dual(M[known], w, c, rule))
            assert gaps[size > 1e-3].max(initial=0.0) <= 1e-10
            rebuilt += int((size > 1e-3).sum())
            active += int(found.clip_active.sum())
    assert rebuilt > 100
    assert active > 100


def test_tiny_caps_amid_opposed_gradients_are_solved_or_said_to_be_open() -> None:
    """Caps of 1e-8 decide whether Gp = 0 can be reached, which is below the rounding of Gp."""
    rng, states = np.random.default_rng(35), []
    for m in (8, 13, 22):
        w = np.exp(-rng.uniform(0.0, 26.0, m))
        w /= w.sum()
        G = families.opposite(rng.standard_normal((60, m, m + 8)), rng)
        M = G @ G.swapaxes(1, 2)
        found = solve_dual((M + M.swapaxes(1, 2)) / 2, w, 0.99, inside(20.0))
        scale = np.sqrt(np.einsum("nii->ni", M)).max(1) * found.g0_norm
        np.testing.assert_array_equal(found.converged, found.gap <= 1e-10 * scale)
        np.testing.assert_array_equal(found.status == "unconverged", ~found.converged)
        assert (found.gap <= 1e-5 * scale).all()
        assert (found.p <= 20.0 * w).all()
        assert abs(found.p.sum(1) - 1.0).max() <= 1e-12
        states += found.converged.tolist()
    assert 20 < sum(states) < len(states) - 20


@pytest.mark.parametrize("make", [families.repeated, families.low_rank, families.small_integers])
def test_of_several_minimisers_inside_takes_the_one_closest_to_the_weights(make: Any) -> None:
    """KKT of the projection: no feasible null direction d has (w - p)'d > 0."""
    rng, tried = np.random.default_rng(1), 0
    for m in (3, 5, 8):
        G = make(rng.standard_normal((8, m, m + 2)), rng)
        w = rng.dirichlet(np.ones(m))
        for kappa in (1.2, 2.0, 5.0):
            for gradients in G:
                p = solve_dual(exact_gram(gradients), w, 0.4, inside(kappa)).p
                constraints = np.vstack([np.ones(m), gradients.T])
                _, sizes, rows = np.linalg.svd(constraints)
                null = rows[np.count_nonzero(sizes > 1e-9 * sizes[0]) :]
                for d in rng.standard_normal((30, len(null))) @ null:
                    room = np.minimum(p[d < -1e-9].min(initial=1.0), 1.0)
                    room = np.minimum(room, (kappa * w - p)[d > 1e-9].min(initial=1.0))
                    if room > 1e-9:
                        assert (w - p) @ d <= 1e-7 * np.linalg.norm(d)
                        tried += 1
    assert tried > 300


@pytest.mark.parametrize("m", [2, 3, 6])
def test_values_of_dependent_gradients_inside(m: int) -> None:
    rng = np.random.default_rng(m)
    for trial in range(20 if m < 6 else 6):
        M = exact_gram(rng.integers(-2, 3, (m, 1 + trial % 3)).astype(float))
        w, kappa = rng.dirichlet(np.ones(m)), KAPPAS[trial % len(KAPPAS)]
        p = reference.minimiser(M, w, 0.4, "cagrad", kappa)
        found = solve_dual(M, w, 0.4, inside(kappa))
        assert found.value == pytest.approx(value_of(M, w, 0.4, p), abs=1e-12 * M.max())


def test_shorter_points_of_a_ray_are_minimisers_too() -> None:
    """f = 0 on all of the ray (-1, 1, 1, 1), in numbers that float64 holds: w moves onto it."""
    G = np.vstack([np.outer([1, 3, 2, 4], [-1, 1, 1, 1]), [24, -8, -8, -8]]).astype(float)
    w = np.array([1, 1, 2, 2, 2]) / 8
    for kappa in (1.5, 3.0, np.inf):
        found = solve_dual(G @ G.T, w, 0.5, inside(kappa))
        np.testing.assert_allclose(found.p, [0.1875, 0.1875, 0.3125, 0.3125, 0.0], rtol=1e-14)
        assert found.value == found.gap == 0.0
    found = solve_dual(G @ G.T, w, 0.5, inside(1.4))
    np.testing.assert_allclose(found.p, [0.175, 0.175, 0.325, 0.325, 0.0], rtol=1e-14)


def test_kinks_within_and_beyond_the_caps() -> None:
    G, w = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 10.0]]), np.array([0.55, 0.35, 0.1])
    for kappa in (1.5, 2.0):
        found = solve_dual(G @ G.T, w, 0.4, inside(kappa))
        np.testing.assert_allclose(found.p, [0.5, 0.5, 0.0], atol=1e-15)
        assert found.value == found.gp_norm == 0.0
        assert found.gap <= 1e-30
        assert found.coefficients.tolist() == w.tolist()
    found = solve_dual(G @ G.T, w, 0.4, inside(1.2))
    np.testing.assert_allclose(found.p, [0.58, 0.42, 0.0], rtol=1e-14)
    assert found.clip_active
    assert found.gap <= 1e-15


def test_inside_between_the_weighted_sum_and_cagrad() -> None:
    rng = np.random.default_rng(0)
    for m in (1, 2, 3, 7):
        M, w = exact_gram(rng.standard_normal((m, m + 2))), rng.dirichlet(np.ones(m))
        one = solve_dual(M, w, 0.4, inside(1))
        np.testing.assert_array_equal(one.p, w)
        np.testing.assert_allclose(one.coefficients, 1.4 * w, rtol=1e-14)
        cagrad = solve_dual(M, w, 0.4, "cagrad")
        free = solve_dual(M, w, 0.4, inside(np.inf))
        np.testing.assert_array_equal(free.p, cagrad.p)
        np.testing.assert_array_equal(free.coefficients, cagrad.coefficients)
        large = solve_dual(M, w, 0.4, inside(1.01 / w.min()))
        np.testing.assert_allclose(large.p, cagrad.p, rtol=0, atol=1e-12)
        assert not large.clip_active
        values = [solve_dual(M, w, 0.4, inside(kappa)).value for kappa in (1.0, 1.5, 3.0, 9.0)]
        assert (np.diff(values) <= 1e-14 * abs(values[0])).all()


def test_inside_keeps_the_properties_of_the_dual() -> None:
    rng = np.random.default_rng(4)
    for m in (2, 4, 9):
        G = rng.standard_normal((m, m + 1))
        M, w = exact_gram(G), rng.dirichlet(np.ones(m))
        w[0], w[-1] = 0.0, w[0] + w[-1]
        found = solve_dual(M, w, 0.4, inside(1.5))
        assert found.p[0] == found.coefficients[0] == 0.0
        scaled = solve_dual(M * 4.0**-40, w, 0.4, inside(1.5))
        np.testing.assert_array_equal(scaled.p, found.p)
        order = rng.permutation(m)
        permuted = solve_dual(M[np.ix_(order, order)], w[order], 0.4, inside(1.5))
        np.testing.assert_allclose(permuted.p, found.p[order], rtol=0, atol=1e-12)
        correction = (found.coefficients - w) @ G
        assert np.linalg.norm(correction) == pytest.approx(0.4 * found.g0_norm, rel=1e-12)
        batch = solve_dual(np.stack([M, np.full((m, m), np.nan), 3.0 * M]), w, 0.4, inside(1.5))
        np.testing.assert_array_equal(batch.p[0], found.p)
        assert batch.status.tolist() == ["ok", "non_finite", "ok"]
    same = solve_dual(np.ones((5, 5)), [0.1, 0.2, 0.3, 0.2, 0.2], 0.4, inside(1.5))
    assert same.p.tolist() == [0.1, 0.2, 0.3, 0.2, 0.2]
    opposed = solve_dual([[1.0, -1.0], [-1.0, 1.0]], [0.5, 0.5], 0.4, inside(1.5))
    assert opposed.coefficients.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("m", [2, 3, 6])
def test_inside_without_a_radius_is_a_linear_programme(m: int) -> None:
    """c = 0: the update is the weighted sum; p still minimises b'p, closest to w among ties."""
    rng = np.random.default_rng(m)
    for trial in range(12):
        G = rng.standard_normal((m, m)) if trial % 2 else rng.integers(-1, 2, (m, 2)).astype(float)
        M, w, kappa = exact_gram(G), rng.dirichlet(np.ones(m)), 1.0 + trial % 4
        found = solve_dual(M, w, 0.0, inside(kappa))
        np.testing.assert_array_equal(found.coefficients, w)
        bounds = [(0.0, min(1.0, kappa * x)) for x in w]
        best = linprog(M @ w, A_eq=np.ones((1, m)), b_eq=[1.0], bounds=bounds)
        size = abs(M).max()
        assert found.value == pytest.approx(best.fun, abs=1e-9 * size)
        nearest = minimize(
            lambda p, w=w: ((p - w) ** 2).sum(),
            best.x,
            bounds=bounds,
            constraints=[
                {"type": "eq", "fun": lambda p: p.sum() - 1.0},
                {"type": "ineq", "fun": lambda p, b=M @ w, f=best.fun: f + 1e-9 - b @ p},
            ],
            method="SLSQP",
            options={"ftol": 1e-14},
        ).x
        np.testing.assert_allclose(found.p, nearest, rtol=0, atol=2e-5)


@pytest.mark.parametrize("q", [1.0, 1.7, 4.0, 64.0])
def test_smooth_in_50_digits(q: float) -> None:
    rng = np.random.default_rng(int(q))
    for m in (2, 3, 8):
        G = rng.standard_normal((m, m + 2))
        M, w = exact_gram(G), rng.dirichlet(np.full(m, 0.3))
        found = solve_dual(M, w, 0.4, smooth(q))
        paper = solve_dual(M, w, 0.4)
        np.testing.assert_array_equal(found.p, paper.p)
        with mpmath.workdps(50):
            for p, x, clipped in zip(found.p, w, found.p_clipped, strict=True):
                if min(p, x) == 0.0:
                    assert clipped == 0.0
                    continue
                terms = mpmath.mpf(float(p)) ** -q + mpmath.mpf(float(x)) ** -q
                assert clipped == pytest.approx(float(terms ** (-1 / mpmath.mpf(q))), rel=4e-15)
        assert (found.p_clipped <= paper.p_clipped).all()
        expected = reference.coefficients(M, w, 0.4, "cagrad-clip", "smooth", q)
        np.testing.assert_allclose(found.coefficients, expected, rtol=1e-8)
        correction = (found.coefficients - w) @ G
        assert np.linalg.norm(correction) == pytest.approx(0.4 * found.g0_norm, rel=1e-11)


def test_smooth_goes_over_into_the_papers_clip() -> None:
    rng = np.random.default_rng(2)
    M = np.stack([exact_gram(rng.standard_normal((4, 6))) for _ in range(30)])
    w = np.array([0.4, 0.3, 0.2, 0.1])
    paper, last = solve_dual(M, w, 0.4), np.inf
    for q in (2.0, 8.0, 32.0, 128.0):
        distance = abs(solve_dual(M, w, 0.4, smooth(q)).coefficients - paper.coefficients).max()
        assert distance < last
        last = distance
    assert last < 0.02
    limit = solve_dual(M, w, 0.4, smooth(np.inf))
    np.testing.assert_array_equal(limit.coefficients, paper.coefficients)
    np.testing.assert_array_equal(limit.clip_active, paper.clip_active)


def test_smooth_of_tiny_numbers() -> None:
    """Powers of 1e-300 leave float64's range; what becomes of them does not."""
    M, w = np.diag([1.0, 2.0, 3.0]), [1.0 - 1e-300, 1e-300, 0.0]
    for q in (1.0, 7.0, 1e4):
        found = solve_dual(M, w, 0.4, smooth(q))
        assert np.isfinite(found.coefficients).all()
        assert 0.0 < found.p_clipped[1] <= 1e-300
        assert found.p_clipped[2] == 0.0


@pytest.mark.parametrize(
    ("rule", "kind", "message"),
    [
        ({"clip": "outside"}, ValueError, r"`clip` .* one of after, inside, smooth, got 'outside'"),
        ({"clip": "inside"}, ValueError, r"'inside' of the rule cagrad-clip needs `kappa`"),
        ({"clip": "smooth"}, ValueError, r"'smooth' of the rule cagrad-clip needs `q`"),
        ({"kappa": 2.0}, ValueError, r"`kappa` .* is for clip 'inside', got 2.0 with clip 'after'"),
        ({"clip": "inside", "kappa": 2, "q": 3}, ValueError, r"`q` .* is for clip 'smooth'"),
        (
            {"clip": "inside", "kappa": 0.9},
            ValueError,
            r"`kappa` .* must be in \[1, inf\], got 0.9",
        ),
        ({"clip": "inside", "kappa": float("nan")}, ValueError, r"`kappa` .* got nan"),
        ({"clip": "smooth", "q": 0.5}, ValueError, r"`q` .* must be in \[1, inf\], got 0.5"),
        ({"clip": "smooth", "q": "2"}, TypeError, r"`q` .* must be a number, got '2'"),
    ],
)
def test_wrong_options(rule: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_rule({"name": "cagrad-clip", **rule})
    with pytest.raises(ValueError, match=r"has the options \[\]"):
        check_rule({"name": "cagrad", **rule})


def test_names_of_the_clips() -> None:
    assert spec_of(check_rule({"name": "cagrad-clip", "clip": "after"})) == "cagrad-clip"
    assert spec_of(check_rule(inside(1.5))) == inside(1.5)
    solution = solve_dual(torch.eye(2), [0.5, 0.5], 0.4, smooth(2.5))
    assert solution.rule == label_of(check_rule(smooth(2.5)))
    assert solution.rule == "cagrad-clip(clip='smooth', q=2.5)"
    for rule in (inside(1.5), smooth(2.5)):  # the paper's clip is solved on the device
        assert "solved on the host" in str(on_device.obstacle(2, label_of(check_rule(rule))))
    assert on_device.obstacle(2, label_of(check_rule("cagrad-clip"))) is None
    with pytest.raises(ValueError, match="option must be at least 1"):
        _C.solve(np.eye(2), np.full(2, 0.5), 0.4, 4, 0.5)
