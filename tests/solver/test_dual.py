"""`solve_dual` as users call it: exact vectors, an independent oracle, inputs, batches, errors."""

from __future__ import annotations

import copy
import gzip
import json
import pickle
from itertools import combinations
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from raco_fast import _C
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.registry import check_rule, spec_of
from raco_fast.solver.rules.conflict_averse import RULES
from raco_fast.solver.weights import check_c, check_weights

WITNESS = np.array([[17.0, -5.0], [-5.0, 2.0]])


def test_oracle_vectors(shared: Path) -> None:
    with gzip.open(shared / "oracle" / "dual_vectors.json.gz") as file:
        rows = json.load(file)
    assert len(rows) == 400
    active = 0
    for row in rows:
        solution = solve_dual(np.array(row["gram"]), row["weights"], row["c"])
        tolerance = 1e-6 if row["kind"] == 3 else 1e-9
        for name in ("p", "p_clipped", "coefficients"):
            np.testing.assert_allclose(
                getattr(solution, name), row[name], rtol=tolerance, atol=1e-30, err_msg=name
            )
        assert solution.value == pytest.approx(row["value"], rel=tolerance)
        assert solution.converged
        active += solution.clip_active
    assert 40 < active < 360, active  # both branches of the clip are seen


def brute_force(M: np.ndarray, w: np.ndarray, c: float, rule: str) -> mpmath.mpf:
    """min f over the simplex in 50 digits: the stationary point of every face, by mpmath's LU."""
    with mpmath.workdps(50):
        m = len(w)
        A, weights = mpmath.matrix(M.tolist()), mpmath.matrix(w.tolist())
        b = A * weights if rule != "mgda" else mpmath.matrix(m, 1)
        s = mpmath.mpf(c) * mpmath.sqrt((weights.T * A * weights)[0]) if rule != "mgda" else 1
        best = mpmath.inf
        for size in range(1, m + 1):
            for face in combinations(range(m), size):
                for x in stationary_points(A, b, s, face):
                    if min(x) >= 0:
                        best = min(best, value_of(A, b, s, face, x))
        return best


def value_of(A: Any, b: Any, s: Any, face: Any, x: Any) -> Any:
    square = sum(x[i] * A[face[i], face[j]] * x[j] for i in range(len(x)) for j in range(len(x)))
    return sum(b[k] * t for k, t in zip(face, x, strict=True)) + s * mpmath.sqrt(max(square, 0))


def stationary_points(A: Any, b: Any, s: Any, face: Any) -> list[Any]:
    """On one face: [A 1; 1' 0] (x, mu) = (-tau b, 1) gives x(tau) = x0 + tau d; tau s = ||Gx||."""
    n = len(face)
    K = mpmath.matrix(n + 1)
    for i in range(n):
        K[i, n] = K[n, i] = 1
        for j in range(n):
            K[i, j] = A[face[i], face[j]]
    right0, right1 = mpmath.matrix(n + 1, 1), mpmath.matrix(n + 1, 1)
    right0[n] = 1
    for i in range(n):
        right1[i] = -b[face[i]]
    x0, d = mpmath.lu_solve(K, right0)[:n], mpmath.lu_solve(K, right1)[:n]
    square0 = value_of(A, [0] * len(b), 1, face, x0) ** 2
    room = s**2 - value_of(A, [0] * len(b), 1, face, d) ** 2
    if room <= 0:
        return []
    tau = mpmath.sqrt(square0 / room)
    return [[u + tau * v for u, v in zip(x0, d, strict=True)]]


@pytest.mark.parametrize("m", [2, 3, 4])
def test_against_brute_force_over_faces_in_50_digits(m: int) -> None:
    rng = np.random.default_rng(m)
    for trial in range(24):
        G = rng.standard_normal((m, m + 1)) * 10.0 ** rng.uniform(-2, 2, (m, 1))
        M, w, c = G @ G.T, rng.dirichlet(np.ones(m)), float(rng.uniform(0.05, 0.95))
        M = np.tril(M) + np.tril(M, -1).T
        rule = RULES[1 + trial % 3]
        solution = solve_dual(M, w, c, rule)
        best = brute_force(M, w, c, rule)
        assert abs(solution.value - best) <= 1e-14 * (abs(best) + solution.g0_norm**2)


@pytest.mark.parametrize("m", [3, 5, 8, 16])
def test_slsqp_finds_nothing_lower(m: int) -> None:
    rng = np.random.default_rng(m)
    for _ in range(4):
        G = rng.standard_normal((m, m + 4))
        M, w, c = G @ G.T, rng.dirichlet(np.ones(m)), 0.4
        solution = solve_dual(M, w, c)
        b, s = M @ w, c * np.sqrt(w @ M @ w)
        found = [
            minimize(
                lambda p, b=b, s=s, M=M: b @ p + s * np.sqrt(p @ M @ p),
                start,
                jac=lambda p, b=b, s=s, M=M: b + s * (M @ p) / np.sqrt(p @ M @ p),
                bounds=[(0.0, 1.0)] * m,
                constraints={
                    "type": "eq",
                    "fun": lambda p: p.sum() - 1.0,
                    "jac": lambda p: np.ones_like(p),
                },
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 500},
            ).fun
            for start in (np.full(m, 1.0 / m), *rng.dirichlet(np.ones(m), 3))
        ]
        scale = abs(solution.value) + solution.g0_norm**2
        assert solution.value <= min(found) + 1e-12 * scale
        assert min(found) <= solution.value + 1e-6 * scale


def test_opposite_gradients_with_a_large_third_meet_at_the_kink() -> None:
    """G p = 0 is optimal, f has a kink there, and the certificate is a subgradient."""
    G = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 10.0]])
    w = np.array([0.55, 0.35, 0.1])
    for rule in ("cagrad", "cagrad-clip"):
        solution = solve_dual(G @ G.T, w, 0.4, rule)
        np.testing.assert_allclose(solution.p, [0.5, 0.5, 0.0], atol=1e-15)
        assert solution.value == solution.gap == 0.0
    assert solution.clip_active
    np.testing.assert_array_equal(solution.p_clipped, [0.5, 0.35, 0.0])
    assert solution.gp_norm == pytest.approx(0.15, rel=1e-14)
    assert solve_dual(G @ G.T, w, 0.4, "cagrad").coefficients.tolist() == w.tolist()


def test_one_objective() -> None:
    solution = solve_dual([[4.0]], [1.0], 0.25)
    assert solution.p.tolist() == [1.0]
    assert solution.coefficients.tolist() == [1.25]
    assert (solution.g0_norm, solution.update_norm, solution.value) == (2.0, 2.5, 5.0)
    assert solve_dual([[0.0]], {"only": 1.0}, 0.25).coefficients.tolist() == [1.0]


def test_all_zero_gradients() -> None:
    solution = solve_dual(np.zeros((3, 3)), [0.2, 0.3, 0.5], 0.4)
    assert solution.coefficients.tolist() == [0.2, 0.3, 0.5]
    assert not solution.cosines.any()


@pytest.mark.parametrize(
    "gram",
    [
        torch.tensor(WITNESS),
        torch.tensor(WITNESS, dtype=torch.float32),
        torch.tensor(WITNESS, dtype=torch.bfloat16, requires_grad=True),
        WITNESS,
        WITNESS.astype(np.float32),
        np.asfortranarray(WITNESS),
        WITNESS.tolist(),
        WITNESS.astype(int).tolist(),
    ],
    ids=["f64", "f32", "bf16 with grad", "numpy", "numpy f32", "fortran", "lists", "int lists"],
)
@pytest.mark.parametrize(
    "weights",
    [
        [0.2, 0.8],
        (0.2, 0.8),
        {"a": 0.2, "b": 0.8},
        np.array([0.2, 0.8]),
        torch.tensor([0.2, 0.8], dtype=torch.float64),
    ],
    ids=["list", "tuple", "dict", "numpy", "torch"],
)
def test_every_kind_of_input_gives_the_same_numbers(gram: Any, weights: Any) -> None:
    solution = solve_dual(gram, weights, 0.5)
    kind = torch.Tensor if isinstance(gram, torch.Tensor) else np.ndarray
    for values in (solution.p, solution.coefficients, solution.gram, solution.cosines):
        assert isinstance(values, kind)
        assert str(values.dtype).endswith("float64")
    expected = solve_dual(WITNESS, [0.2, 0.8], 0.5)
    assert solution.coefficients.tolist() == expected.coefficients.tolist()
    assert isinstance(solution.gap, float)
    assert solution.clip_active is True
    assert solution.finite is True


def test_solution_outlives_and_ignores_its_input() -> None:
    gram = torch.tensor(WITNESS)
    solution = solve_dual(gram, {"a": 0.2, "b": 0.8}, 0.5)
    gram.zero_()
    solution.p.zero_()
    assert solution.gram.tolist() == WITNESS.tolist()
    for twin in (copy.deepcopy(solution), pickle.loads(pickle.dumps(solution))):
        assert torch.equal(twin.p, solution.p)
        assert twin.p.sum() == pytest.approx(1.0, abs=1e-15)
        assert twin.names == ("a", "b")
        assert repr(twin) == repr(solution)
    assert "a: 0.356145" in repr(solution)
    assert "cagrad-clip" in repr(solution)


def test_cosines() -> None:
    G = np.array([[3.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    expected = [[1.0, 0.0, -np.sqrt(0.5)], [0.0, 0.0, 0.0], [-np.sqrt(0.5), 0.0, 1.0]]
    np.testing.assert_allclose(solve_dual(G @ G.T, [0.2, 0.3, 0.5], 0.4).cosines, expected, 1e-15)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 32])
def test_batch_is_the_single_problems_bit_for_bit(m: int, rule: str) -> None:
    rng = np.random.default_rng(m)
    G = rng.standard_normal((17, m, m + 2))
    M = G @ G.swapaxes(1, 2)
    M = (M + M.swapaxes(1, 2)) / 2
    M[3] = 0.0
    M[5, 0, 0] = np.nan
    w = rng.dirichlet(np.ones(m))
    batch = solve_dual(torch.tensor(M), w, 0.4, rule)
    names = ("p", "p_clipped", "coefficients", "gap", "value", "g0_norm", "gp_norm", "update_norm")
    flags = ("clip_active", "finite", "converged")
    for k in range(17):
        single = solve_dual(M[k], w, 0.4, rule)
        for name in (*names, *flags, "cosines", "gram"):
            np.testing.assert_array_equal(getattr(batch, name)[k], getattr(single, name), name)
    assert batch.finite.tolist() == [k != 5 for k in range(17)]
    assert batch.p.shape == batch.coefficients.shape == (17, m)
    assert f"n=17, m={m}" in repr(batch)
    assert "finite=False" in repr(solve_dual(M[5], w, 0.4, rule))


def test_empty_batch() -> None:
    assert solve_dual(np.zeros((0, 3, 3)), [0.2, 0.3, 0.5], 0.4).p.shape == (0, 3)


def test_check_weights_returns_names_and_values() -> None:
    assert check_weights({"helpful": 0.25, "harmless": 0.75}) == (
        ("helpful", "harmless"),
        (0.25, 0.75),
    )
    assert check_weights(torch.tensor([0.5, 0.5])) == (("0", "1"), (0.5, 0.5))
    assert check_weights([1]) == (("0",), (1.0,))
    assert check_c(0) == 0.0
    assert [spec_of(check_rule(rule)) for rule in RULES] == list(RULES)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            {"a": 0.5, "b": 0.4},
            ValueError,
            r"must sum to 1, got 0.9 for \{'a': 0.5, 'b': 0.4\}; div",
        ),
        ([0.5, 0.6], ValueError, r"`weights` must sum to 1, got 1.1 for \[0.5, 0.6\]; divide by"),
        ([1.5, -0.5], ValueError, r"must not be negative, got \[1.5, -0.5\]; a weight of 0"),
        ([0.5, float("nan")], ValueError, r"must be finite, got \[0.5, nan\]"),
        ([0.5, float("inf")], ValueError, "must be finite"),
        ([], ValueError, "must hold 1 to 32 objectives, got 0"),
        ([1 / 33] * 33, ValueError, "must hold 1 to 32 objectives, got 33"),
        (np.full((2, 2), 0.25), ValueError, r"must have one dimension, got shape \(2, 2\)"),
        (["0.5", "0.5"], TypeError, r"must be numbers, got \['0.5', '0.5'\]; pass one float"),
        ([0.5, None], TypeError, "must be numbers"),
        ({1: 0.5, 2: 0.5}, TypeError, "must have strings as names, got 1"),
        ("half", TypeError, "must be a mapping from name to number or a sequence"),
        (0.5, TypeError, "must be a mapping from name to number or a sequence"),
    ],
)
def test_bad_weights(weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_weights(weights)
    with pytest.raises(error, match=message):
        solve_dual(WITNESS, weights, 0.4)


@pytest.mark.parametrize(
    ("c", "error", "message"),
    [
        (-0.1, ValueError, r"`c` must be in \[0, 1\), got -0.1; c = 0 is plain weighting"),
        (1.0, ValueError, r"`c` must be in \[0, 1\), got 1.0"),
        (float("nan"), ValueError, r"`c` must be in \[0, 1\), got nan"),
        (None, TypeError, "`c` must be a number, got None"),
        ("0.4", TypeError, "`c` must be a number, got '0.4'"),
    ],
)
def test_bad_c(c: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solve_dual(WITNESS, [0.2, 0.8], c)


@pytest.mark.parametrize(
    ("gram", "error", "message"),
    [
        (np.eye(3), ValueError, r"with m = 2 \(one row a weight\), got shape \(3, 3\)"),
        (np.zeros((2, 3)), ValueError, r"got shape \(2, 3\)"),
        (np.zeros(4), ValueError, r"must be \[m, m\] or \[n, m, m\]"),
        (np.zeros((1, 1, 2, 2)), ValueError, r"got shape \(1, 1, 2, 2\)"),
        ([[1.0, 2.0], [3.0]], TypeError, "`gram` must be a matrix of real numbers"),
        ([["a", "b"], ["c", "d"]], TypeError, "`gram` must be a matrix of real numbers"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "must be real, got a complex"),
        ([[1.0, 0.5], [0.25, 1.0]], ValueError, r"must be symmetric, got gram\[1, 0\] = 0.25 and"),
        ([[1.0, 0.0], [0.0, -1.0]], ValueError, r"non-negative diagonal, got gram\[1, 1\] = -1"),
        ([[-1.0, 0.0], [0.0, 0.0]], ValueError, r"non-negative diagonal, got gram\[0, 0\] = -1"),
        (
            [[1.0, 3.0], [3.0, 4.0]],
            ValueError,
            r"\|M_ij\| <= sqrt\(M_ii M_jj\), got gram\[1, 0\] = 3",
        ),
    ],
)
def test_bad_gram(gram: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solve_dual(gram, [0.2, 0.8], 0.4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("broken", "status"),
    [
        ([[np.nan, 0.0], [0.0, 1.0]], "non_finite"),
        ([[1.0, np.inf], [np.inf, 1.0]], "non_finite"),
        ([[-1.0, 0.0], [0.0, 1.0]], "negative_diagonal"),
        ([[1.0, 0.5], [0.25, 1.0]], "asymmetric"),
        ([[1.0, 3.0], [3.0, 4.0]], "not_gram"),
    ],
)
def test_what_is_wrong_with_one_problem_stays_in_it(broken: Any, status: str, rule: str) -> None:
    kept, names = solve_dual(WITNESS, [0.2, 0.8], 0.5, rule), ("p", "p_clipped", "coefficients")
    scalars = ("gap", "value", "g0_norm", "gp_norm", "update_norm")
    batch = solve_dual(np.stack([WITNESS, np.array(broken), WITNESS]), [0.2, 0.8], 0.5, rule)
    assert batch.status.tolist() == ["ok", status, "ok"]
    assert kept.status == "ok"
    for name in (*names, *scalars):
        values = getattr(batch, name)
        assert np.isnan(values[1]).all(), name
        np.testing.assert_array_equal(values[[0, 2]], [getattr(kept, name)] * 2, name)
    assert batch.finite.tolist() == [True, status != "non_finite", True]
    assert batch.converged.tolist() == [True, False, True]
    assert batch.clip_active.tolist() == [kept.clip_active, False, kept.clip_active]
    if status == "non_finite":
        assert solve_dual(broken, [0.2, 0.8], 0.5, rule).status == status


def test_rounding_of_a_float32_gram_is_no_error() -> None:
    M = WITNESS.astype(np.float32)
    M[0, 1] = np.nextafter(M[0, 1], np.float32(0))
    assert solve_dual(M, [0.2, 0.8], 0.5).p[0] == pytest.approx(0.356145, rel=1e-5)
    assert solve_dual(-1e-15 * np.eye(2) + np.diag([1.0, 0.0]), [0.2, 0.8], 0.5).finite


@pytest.mark.parametrize(
    ("gram", "weights", "rule", "message"),
    [
        (np.eye(33), np.full(33, 1 / 33), 2, "1 <= m <= 32"),
        (np.zeros((2, 3)), np.ones(3), 2, "square"),
        (np.eye(2), np.ones(3), 2, "weights must be"),
        (np.zeros(3), np.ones(3), 2, "gram must be"),
        (np.eye(2), np.array([0.5, 0.5]), 6, "rule must be"),
    ],
)
def test_the_extension_refuses_what_would_break_memory(
    gram: Any, weights: Any, rule: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _C.solve(gram, weights, 0.4, rule)


def test_the_extension_converts_other_arrays_and_refuses_text() -> None:
    gram, weights = np.array([[17.0, -5.0], [-5.0, 2.0]]), np.array([0.2, 0.8])
    expected = _C.solve(gram, weights, 0.5, 2)
    for other in (gram.astype(np.float32), np.asfortranarray(gram), gram.astype(">f8")):
        np.testing.assert_array_equal(_C.solve(other, weights, 0.5, 2), expected)
    with pytest.raises(TypeError, match="must hold real numbers"):
        _C.solve(np.array([["a", "b"], ["c", "d"]]), weights, 0.5, 2)
