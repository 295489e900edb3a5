"""Every rule beside an independent truth: the gradients themselves, optimality conditions, TorchJD.

A Gram matrix holds gradients to half their digits, so families whose answer hangs on the other half
are judged by the optimality conditions, and errors are relative to the terms: Σ |a_i| ‖g_i‖.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradient_families as families
import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from raco_fast.solver.dual import solve_dual
from raco_fast.solver.registry import OURS
from raco_fast.solver.rules.pcgrad import orders

BOUND = 1e-7
# What a truth in float64 can say about coefficients, and the harder ones.
TAME = (
    families.generic,
    families.low_rank,
    families.repeated,
    families.opposite,
    families.zero_gradient,
    families.common_component,
    families.small_integers,
)
INDEPENDENT = (families.generic, families.common_component)
OPTIONS = {
    "capped-mgda": ({"alpha": 0.3}, {"alpha": 0.8}, {"alpha": 1.0}),
    "gapo": ({"p": 0.5}, {"p": 1.0}, {"p": 2.0}),
    "fairgrad": ({"alpha": 0.1}, {"alpha": 0.7}, {"alpha": 3.0}, {"alpha": 20.0}),
    "aligned-mtl": ({"scale": "min"}, {"scale": "median"}, {"scale": "mean"}),
    "pcgrad": ({"seed": 3},),
    "gradvac": ({"beta": 0.3, "seed": 5},),
    "pcd": ({"tau": 0.1, "beta": 0.9},),
}
CERTIFIED = ("linear", "cagrad", "cagrad-clip", "mgda")
RULES = [name for name in OURS if name not in CERTIFIED]
RANDOM = ("pcgrad", "gradvac", "pcd")  # depend on the order of the objectives

Case = tuple[np.ndarray, np.ndarray, np.ndarray]


def cases(make: Any, n: int, seed: int = 0) -> Iterator[Case]:
    """(gradients, Gram, weights) of n problems with 2 to 8 objectives, scaled by up to 1e±6."""
    for trial in range(n):
        rng = np.random.default_rng([seed, trial, families.FAMILIES.index(make)])
        m = 2 + trial % 7
        G = make(rng.standard_normal((1, m, m + int(rng.integers(2, 12)))), rng)[0]
        G *= 10.0 ** rng.uniform(-6, 6)
        w = rng.dirichlet(np.ones(m)) if trial % 3 else np.full(m, 1.0 / m)
        if m > 2 and trial % 5 == 4:
            w[rng.integers(m)] = 0.0
            w /= w.sum()
        M = np.array([[np.dot(a, b) for b in G] for a in G])
        yield G, M, w


def options_of(name: str) -> Iterator[Any]:
    for options in OPTIONS.get(name, ({},)):
        yield {"name": name, **options}


def solved(M: np.ndarray, w: np.ndarray, rule: Any, **more: Any) -> np.ndarray:
    solution = solve_dual(M, w, 0.4, rule, **more)
    assert solution.status == "ok"
    return solution.coefficients


def lengths(M: np.ndarray) -> np.ndarray:
    return np.sqrt(np.diag(M))


def error(G: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Of the update, relative to the terms of both (of coefficients that are not rounding)."""
    terms = (abs(a) + abs(b) + 1e-8) @ np.linalg.norm(G, axis=1)
    return float(np.linalg.norm((a - b) @ G) / terms) if terms else 0.0


# Truths: (G, w, rule) -> coefficients, from the gradients.


def pcgrad(G: np.ndarray, w: np.ndarray, rule: Any) -> np.ndarray:
    order, eye = orders(rule["seed"], 0, len(w)), np.eye(len(w))
    total = np.zeros(len(w))
    for i in range(len(w)):
        g, a = G[i].copy(), eye[i].copy()
        for j in order[i]:
            product, square = g @ G[j], G[j] @ G[j]
            if j != i and product < 0.0:
                g, a = g - product / square * G[j], a - product / square * eye[j]
        total += w[i] * a
    return total


def gradvac(G: np.ndarray, w: np.ndarray, rule: Any) -> np.ndarray:
    """The first step: all aims are 0, so it is a projection that forgets small rests."""
    order, total = orders(rule["seed"], 0, len(w)), np.zeros(G.shape[1])
    for i in range(len(w)):
        g = G[i].copy()
        for j in order[i]:
            size = np.linalg.norm(G[j])
            if j == i or size == 0.0 or np.linalg.norm(g) <= 1e-7 * np.linalg.norm(G[i]):
                continue
            cosine = g @ G[j] / (np.linalg.norm(g) * size)
            if cosine < 0.0:
                g -= np.linalg.norm(g) * cosine / size * G[j]
        total += w[i] * g
    return coordinates(G, total)


def coordinates(G: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Coefficients of a vector in the span of gradients."""
    size = np.linalg.norm(G, axis=1)
    unit = G / np.where(size > 0.0, size, 1.0)[:, None]
    return np.linalg.lstsq(unit.T, x, rcond=1e-12)[0] / np.where(size > 0.0, size, 1.0)


def imtl_g(G: np.ndarray, w: np.ndarray, rule: Any) -> np.ndarray:
    U, s, _ = np.linalg.svd(G, full_matrices=False)
    d = np.linalg.norm(G, axis=1)
    known = (s > 1e-6 * s[0]) & (abs(U.T @ d) > 1e-12 * np.linalg.norm(d))
    v = U[:, known] @ ((U.T @ d)[known] / s[known] ** 2)
    total = v.sum()
    return v / total if abs(total) > 1e-12 * abs(v).sum() else np.zeros_like(v)


def aligned(G: np.ndarray, w: np.ndarray, rule: Any) -> np.ndarray:
    U, s, _ = np.linalg.svd(G, full_matrices=False)
    kept = s > 1e-6 * s[0]
    U, s = U[:, kept], s[kept]
    level = {
        "min": s[-1],
        "median": np.sqrt(np.sort(s**2)[(len(s) - 1) // 2]),
        "mean": np.sqrt((s**2).mean()),
    }[rule["scale"]]
    return level * U @ (U.T @ w / s)


def projected(G: np.ndarray, u: np.ndarray) -> np.ndarray:
    """argmin v'Mv over v >= u by Lawson and Hanson, on unit gradients."""
    size = np.linalg.norm(G, axis=1)
    unit = G / np.where(size > 0.0, size, 1.0)[:, None]
    x, _ = nnls(unit.T / size.max(), -(u @ G) / size.max())
    return u + np.divide(x, size, out=np.zeros_like(x), where=size > 0.0)


def dualproj(G: np.ndarray, w: np.ndarray, rule: Any) -> np.ndarray:
    return projected(G, w)


def upgrad(G: np.ndarray, w: np.ndarray, rule: Any) -> np.ndarray:
    return sum(projected(G, u) for u in np.diag(w))


TRUTHS: dict[str, Callable[..., np.ndarray]] = {
    "pcgrad": pcgrad,
    "gradvac": gradvac,
    "imtl-g": imtl_g,
    "aligned-mtl": aligned,
    "dualproj": dualproj,
    "upgrad": upgrad,
}


def check_against_the_gradients(name: str, make: Any, n: int, seed: int = 0) -> None:
    for G, M, w in cases(make, n, seed):
        for rule in options_of(name):
            a, b = solved(M, w, rule), TRUTHS[name](G, w, rule)
            assert error(G, a, b) <= BOUND, (rule, M.tolist(), w, a, b)


@pytest.mark.parametrize("make", TAME, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", TRUTHS)
def test_against_the_gradients(name: str, make: Any) -> None:
    check_against_the_gradients(name, make, 14)


@pytest.mark.slow
@pytest.mark.parametrize("make", TAME, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", TRUTHS)
def test_against_the_gradients_500_times(name: str, make: Any) -> None:
    check_against_the_gradients(name, make, 500, seed=1)


# Optimality: (M, w, rule, a) -> how far the conditions are from holding, relative to their terms.


def of_the_simplex(M: np.ndarray, w: np.ndarray, rule: Any, a: np.ndarray) -> float:
    """‖GSλ‖² less its bound min_i (SMSλ)_i, for a = Sλ, over the objectives with a direction."""
    d = lengths(M)
    if rule["name"] == "mgda-decoupled":
        losses = np.arange(1.0, 1.0 + len(w))
        return frank_wolfe(M / losses / losses[:, None], a, np.ones(len(w)))
    there = d > 0.0
    power = rule.get("p", 1.0)
    assert not a[~there].any()
    M, a, d = M[np.ix_(there, there)], a[there], d[there]
    if not len(d):
        return 0.0
    lam = a * d**power
    lam = lam / lam.sum()  # the length of Chebyshev's update is judged elsewhere
    return frank_wolfe(M / d**power / d[:, None] ** power, lam, np.ones(len(d)))


def frank_wolfe(M: np.ndarray, p: np.ndarray, caps: np.ndarray) -> float:
    """p'Mp - min over {x in the simplex, x <= caps} of x'Mp, and how far p is from that set."""
    outside = max(-p.min(), (p - caps).max(), abs(p.sum() - 1.0))
    assert outside <= 1e-12
    y, left, least = M @ p, 1.0, 0.0
    for i in np.argsort(y):
        share = min(left, caps[i])
        least, left = least + share * y[i], left - share
    largest = lengths(M).max()
    terms = (p @ lengths(M) + 1e-12 * largest) * largest
    if p @ y <= 1e-15 * (p @ lengths(M)) ** 2:
        return 0.0  # the update is zero, as far as a Gram matrix can tell
    return float((p @ y - least) / terms)


def of_caps(M: np.ndarray, w: np.ndarray, rule: Any, a: np.ndarray) -> float:
    return frank_wolfe(M, a, w / rule["alpha"])


def of_shares(M: np.ndarray, w: np.ndarray, rule: Any, a: np.ndarray) -> float:
    """(Ma)_i = (a_i / (m w_i))^(-1/α), or a combination of the gradients that is zero."""
    there, power = (lengths(M) > 0.0) & (w > 0.0), 1.0 / rule.get("alpha", 1.0)
    assert not a[~there].any()
    a, M, omega = a[there], M[np.ix_(there, there)], len(w) * w[there]
    if not len(a):
        return 0.0
    terms = abs(M) @ a
    if a @ M @ a <= 1e-14 * (a @ lengths(M)) ** 2:
        assert a.min() >= 0.0
        return 0.0
    assert a.min() > 0.0
    right = (a / omega) ** -power
    return float((abs(M @ a - right) / (terms + right)).max())


def of_a_projection(M: np.ndarray, w: np.ndarray, rule: Any, a: np.ndarray) -> float:
    """v >= w, Mv >= 0, and one of both with equality."""
    d = lengths(M)
    total = abs(a) @ d
    if total == 0.0:
        return 0.0
    x, y = (a - w) * d / total, np.divide(M @ a, d * total, out=np.zeros_like(d), where=d > 0.0)
    assert x.min() >= 0.0
    return max(0.0, -y.min(), float((x * abs(y)).max()))


CONDITIONS: dict[str, Callable[..., float]] = {
    "gapo": of_the_simplex,
    "chebyshev": of_the_simplex,
    "mgda-decoupled": of_the_simplex,
    "capped-mgda": of_caps,
    "nash": of_shares,
    "fairgrad": of_shares,
    "dualproj": of_a_projection,
}


def check_conditions(name: str, make: Any, n: int, seed: int = 2) -> None:
    for _, M, w in cases(make, n, seed):
        for rule in options_of(name):
            a = solved(M, w, rule, losses=np.arange(1.0, 1.0 + len(w)))
            assert CONDITIONS[name](M, w, rule, a) <= 1e-9, (rule, M.tolist(), w, a)


@pytest.mark.parametrize("make", families.FAMILIES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", CONDITIONS)
def test_the_conditions_of_an_optimum(name: str, make: Any) -> None:
    check_conditions(name, make, 14)


@pytest.mark.slow
@pytest.mark.parametrize("make", families.FAMILIES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", CONDITIONS)
def test_the_conditions_of_an_optimum_500_times(name: str, make: Any) -> None:
    check_conditions(name, make, 500, seed=3)


# TorchJD, on Grams that its own tolerances do not change.


def fixed_orders(monkeypatch: pytest.MonkeyPatch, order: np.ndarray, others: bool) -> None:
    """torch.randperm hands out one row of `order` a call, as places among the others if asked."""
    rows = iter(
        [[j - (j > i) for j in row if j != i] if others else row for i, row in enumerate(order)]
    )
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(np.array(next(rows))))


def close(a: np.ndarray, b: Any) -> None:
    np.testing.assert_allclose(a, np.asarray(b), rtol=BOUND, atol=BOUND * abs(a).max())


def comfortable(n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for trial in range(n):
        rng = np.random.default_rng(trial)
        m = 2 + trial % 6
        G = rng.standard_normal((m, m + 3)) * rng.uniform(0.3, 3.0, (m, 1))
        yield np.array([[np.dot(a, b) for b in G] for a in G]), rng.dirichlet(np.full(m, 3.0))


def test_pcgrad_and_gradvac_of_torchjd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps: GradVac remembers. The weights are those of the losses."""
    from torchjd.aggregation import GradVacWeighting, PCGradWeighting

    for M, w in comfortable(24):
        ours = ({"name": "pcgrad", "seed": 9}, {"name": "gradvac", "beta": 0.4, "seed": 9})
        theirs = (PCGradWeighting(), GradVacWeighting(beta=0.4, eps=0.0))
        for rule, other in zip(ours, theirs, strict=True):
            state = None
            for step in range(4):
                H = M * (1.0 + 0.3 * step) + step * np.diag(np.diag(M))
                solution = solve_dual(H, w, 0.4, rule, state=state)
                state = solution.state
                fixed_orders(monkeypatch, orders(9, step, len(w)), rule["name"] == "gradvac")
                close(solution.coefficients, other(torch.tensor(H * w * w[:, None])).numpy() * w)
            assert state["steps"] == 4.0


def test_weightings_of_torchjd() -> None:
    """Not its QPs, which it regularises, and its FairGrad to the tolerance of SciPy's root."""
    from torchjd import aggregation

    for M, w in comfortable(24):
        H, preferences = torch.tensor(M), torch.tensor(w)
        close(solved(M, w, "imtl-g"), aggregation.IMTLGWeighting()(H))
        for scale, theirs in (("min", "min"), ("median", "median"), ("mean", "rmse")):
            other = aggregation.AlignedMTLWeighting(preferences, theirs)
            close(solved(M, w, {"name": "aligned-mtl", "scale": scale}), other(H))
        even = np.full(len(w), 1.0 / len(w))
        for alpha in (1.0, 2.0):
            other = aggregation.FairGradWeighting(alpha)(H).numpy()
            found = solved(M, even, {"name": "fairgrad", "alpha": alpha})
            np.testing.assert_allclose(found, other, rtol=1e-5)
        np.testing.assert_array_equal(
            solved(M, w, "nash"), solved(M, w, {"name": "fairgrad", "alpha": 1.0})
        )


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.7])
def test_pcd_of_torchjd(tau: float) -> None:
    """Four steps each, also where the conditions contradict each other."""
    from torchjd.aggregation import PCDWeighting

    dropped = 0
    for make in TAME:
        for G, M, w in cases(make, 7, seed=4):
            state, other = None, PCDWeighting(tau=tau, beta=0.9, eps=0.0)
            for step in range(4):
                H = M * (1.0 + 0.3 * step)
                solution = solve_dual(
                    H, w, 0.4, {"name": "pcd", "tau": tau, "beta": 0.9}, state=state
                )
                state, expected = solution.state, other(torch.tensor(H)).numpy()
                assert error(G, solution.coefficients, expected) <= 1e-6
                dropped += solution.coefficients[1:].any() == 0.0
    assert dropped > 30


# What holds for every rule.


@pytest.mark.parametrize("name", [name for name in RULES if name != "modo"])
def test_scale(name: str) -> None:
    """Not of modo, whose steps have a unit."""
    for make in INDEPENDENT if name == "mgda-decoupled" else TAME:
        for G, M, w in cases(make, 7, seed=5):
            losses = np.linspace(0.5, 2.0, len(w))
            a = solved(M, w, name, losses=losses)
            for kappa in (4.0**20, 1e-12, 1e12):
                b = solved(kappa * M, w, name, losses=losses)
                size_a, size_b = (abs(x) @ lengths(M) for x in (a, b))
                assert error(G, a * size_b, b * size_a) <= 1e-8


@pytest.mark.parametrize("name", OURS)
def test_whether_coefficients_change_with_the_scale(name: str) -> None:
    """Where the gradients of a second step have another factor than those of the first."""
    w, first, second = [0.6, 0.4], np.array([[4.0, -3.0], [-3.0, 9.0]]), np.eye(2) * 12 - 3
    state = solve_dual(first, w, 0.4, name, losses=[1, 2]).state
    found = [
        solve_dual(
            factor**2 * second, w, 0.4, name, losses=[factor, 2 * factor], state=state
        ).coefficients
        for factor in (1.0, 8.0)
    ]
    assert (abs(found[1] - found[0]).max() < 1e-9) == OURS[name].scale_invariant


@pytest.mark.parametrize("name", [name for name in RULES if name not in RANDOM])
def test_order_of_the_objectives(name: str) -> None:
    rng = np.random.default_rng(0)
    # With long steps rounding can decide which vertex of two is left for the other.
    rule = {"name": name, "lr": 0.2} if name == "sdmgrad" else name
    for make in INDEPENDENT if name == "mgda-decoupled" else TAME:
        for G, M, w in cases(make, 14, seed=6):
            losses, order = np.linspace(0.5, 2.0, len(w)), rng.permutation(len(w))
            a = solved(M, w, rule, losses=losses)
            b = solved(M[order][:, order], w[order], rule, losses=losses[order])
            back = np.empty_like(b)
            back[order] = b
            assert error(G, a, back) <= 1e-7, (M.tolist(), w, a, back)


@pytest.mark.parametrize("name", OURS)
def test_whether_weights_matter(name: str) -> None:
    (M, w), *_ = comfortable(1)
    a, b = (solve_dual(M, x, 0.4, name, losses=[1, 2]).coefficients for x in (w, w[::-1]))
    assert (abs(a - b).max() > 0.01) == OURS[name].uses_weights


@pytest.mark.parametrize("name", RULES)
def test_one_objective_and_none_that_moves(name: str) -> None:
    one = solve_dual([[4.0]], [1.0], 0.4, name, losses=[2.0])
    assert one.coefficients[0] > 0.0
    assert one.update_norm == pytest.approx(2.0 * one.coefficients[0], rel=1e-15)
    nothing = solve_dual(np.zeros((3, 3)), [0.2, 0.3, 0.5], 0.4, name, losses=[1, 1, 1])
    assert np.isfinite(nothing.coefficients).all()
    assert nothing.update_norm == 0.0


@pytest.mark.parametrize("name", RULES)
def test_a_batch_is_its_problems(name: str) -> None:
    rng = np.random.default_rng(1)
    G = rng.standard_normal((5, 3, 6))
    G[1, 2] = 0.0
    G[2, 1] = -G[2, 0]
    M = G @ G.swapaxes(1, 2)
    M, w, losses = (M + M.swapaxes(1, 2)) / 2, [0.2, 0.3, 0.5], rng.uniform(0.5, 2.0, (5, 3))
    M[3, 0, 0] = np.inf
    batch = solve_dual(M, w, 0.4, name, losses=losses)
    for k in range(5):
        one = solve_dual(M[k], w, 0.4, name, losses=losses[k])
        np.testing.assert_allclose(batch.coefficients[k], one.coefficients, rtol=1e-12, atol=1e-14)
        assert batch.status[k] == one.status


@pytest.mark.parametrize(
    "name", [name for name in RULES if name not in ("cr-mogm", "sdmgrad", "modo")]
)
def test_what_a_gradient_of_zero_means(name: str) -> None:
    """As each rule's docstring has it: left out, harmless, or the end of the way."""
    G = np.array([[1.0, 0.2, 0.0], [0.0, 0.0, 0.0], [-0.6, 1.0, 0.1]])
    w, rest = np.array([0.3, 0.3, 0.4]), [0, 2]
    a = solved(G @ G.T, w, name, losses=[1.0, 1.0, 1.0])
    if name in ("mgda-decoupled", "capped-mgda"):
        assert a[1] == pytest.approx(1.0 if name == "mgda-decoupled" else 0.6, rel=1e-12)
        # A step without a label for an objective has neither a loss nor a gradient of it.
        unlabelled = solved(G @ G.T, w, name, losses=[1.0, 0.0, 1.0])
        np.testing.assert_array_equal(unlabelled, a)
        return
    assert a[1] == {"pcgrad": 0.3, "gradvac": 0.3, "dualproj": 0.3, "upgrad": 0.3}.get(name, 0.0)
    without = solve_dual((G @ G.T)[rest][:, rest], w[rest] / 0.7, 0.4, name, losses=[1.0, 1.0])
    update, expected = a @ G, without.coefficients @ G[rest]
    if name not in RANDOM:  # their orders are others without it
        cosine = update @ expected / np.linalg.norm(update) / np.linalg.norm(expected)
        assert cosine == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", ["nash", "fairgrad", "chebyshev", "gapo", "mgda-decoupled"])
def test_a_stationary_point_is_the_end(name: str) -> None:
    G = np.array([[1.0, 0.0, 0.0], [-0.5, 0.5, 0.0], [-0.5, -0.5, 0.0]])
    solution = solve_dual(G @ G.T, [0.2, 0.3, 0.5], 0.4, name, losses=[1.0, 1.0, 1.0])
    assert solution.update_norm == 0.0
    assert solution.coefficients.min() > 0.0


def test_relatives() -> None:
    """Rules that are another one for some option or weights."""
    for M, w in comfortable(12):
        even = np.full(len(w), 1.0 / len(w))
        linear, mgda = (solve_dual(M, w, 0.4, rule).coefficients for rule in ("linear", "mgda"))
        close(solved(M, w, {"name": "capped-mgda", "alpha": 1.0}), linear)
        close(solved(M, w, {"name": "capped-mgda", "alpha": 1e-9}), mgda)
        close(solved(M, w, {"name": "gapo", "p": 0}), mgda)
        close(solved(M, w, "mgda-decoupled", losses=np.full(len(w), 3.0)), mgda)
        nash = solved(M, even, "nash")
        close(nash * (M @ nash), np.ones(len(w)))
        chebyshev, gapo = solved(M, w, "chebyshev"), solved(M, w, {"name": "gapo", "p": 1.0})
        close(chebyshev / chebyshev.sum(), gapo / gapo.sum())
        assert solve_dual(M, w, 0.4, "chebyshev").update_norm == pytest.approx(1.0, rel=1e-12)
        agreeing = np.abs(M)
        if np.linalg.eigvalsh(agreeing)[0] > 0.0:
            for name in ("dualproj", "upgrad", "pcgrad"):
                close(solved(agreeing, w, name), linear)


@pytest.mark.parametrize(
    ("rule", "error_type", "message"),
    [
        (
            {"name": "fairgrad", "alpha": 0.0},
            ValueError,
            r"`alpha` of the rule fairgrad must be in",
        ),
        (
            {"name": "fairgrad", "alpha": "2"},
            TypeError,
            "`alpha` of the rule fairgrad must be a num",
        ),
        ({"name": "capped-mgda", "alpha": 1.5}, ValueError, r"must be in \(0, 1\], got 1.5"),
        ({"name": "gapo", "p": -1.0}, ValueError, "`p` of the rule gapo must be in"),
        ({"name": "gradvac", "beta": True}, TypeError, "must be a number, got True"),
        (
            {"name": "pcd", "beta": 1.0},
            ValueError,
            r"`beta` of the rule pcd must be in \[0, 1\), got",
        ),
        ({"name": "pcd", "tau": -0.1}, ValueError, "`tau` of the rule pcd must be in"),
        (
            {"name": "aligned-mtl", "scale": "max"},
            ValueError,
            "must be min, median or mean, got 'max",
        ),
        (
            {"name": "mgda-decoupled"},
            ValueError,
            r"`losses` must be positive .* got \[\[1.0, 0.0\]\]",
        ),
    ],
)
def test_bad_options(rule: Any, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        solve_dual(np.eye(2), [0.5, 0.5], 0.4, rule, losses=[1.0, 0.0])


def test_orders_of_steps_beside_one_another_have_no_row_in_common():
    drawn = np.stack([orders(3, step, 8) for step in range(12)])
    assert len(np.unique(drawn.reshape(-1, 8), axis=0)) == 12 * 8
