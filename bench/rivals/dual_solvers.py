"""Who solves the dual problem, on the same Grams: min over the simplex of f(p) = bᵀp + s √(pᵀMp),
with b = M w and s = c √(wᵀMw) (arXiv 2602.02495, Algorithm 1).

The closed forms are that problem's own, written out: along an edge f is a line plus the root of a
parabola; inside a triangle M p is parallel to λ1 − b, where λ solves a quadratic equation. All
faces are tried and the best is kept, as the paper's published note does for two and three
objectives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import numpy as np
import torch

from bench.harness import optional
from raco_fast import _C
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.rules.conflict_averse import CAGradClip
from raco_fast.solver.solution import DualSolution

C = 0.4
SIZES = (2, 3, 4, 8, 16, 32)
GRAMS = 16

Solve = Callable[[Any], Any]


def grams(m: int) -> list[np.ndarray]:
    """Grams of m gradients whose cosines vary between conflict and agreement."""
    rng = np.random.default_rng(m)
    matrices = []
    for _ in range(GRAMS):
        G = rng.standard_normal((m, 2 * m)) * rng.uniform(0.3, 3.0, (m, 1))
        matrices.append(G @ G.T)
    return [np.tril(M) + np.tril(M, -1).T for M in matrices]


def value(M: np.ndarray, p: np.ndarray) -> float:
    """f(p) for equal weights."""
    w = np.full(len(M), 1.0 / len(M))
    return float(M @ w @ p + C * np.sqrt(w @ M @ w) * np.sqrt(max(0.0, p @ M @ p)))


@dataclass(frozen=True)
class Solver:
    """`solve(inputs[k])` is timed; `p(result)` is its point of the simplex, for M = grams[k]."""

    solve: Solve
    inputs: Sequence[Any]
    p: Callable[[Any], np.ndarray]


def solvers(m: int) -> dict[str, Solver]:
    """Name -> solver, of those that are installed and take m objectives; equal weights."""
    matrices = grams(m)
    w, rule = np.full(m, 1.0 / m), CAGradClip.number
    weights = {f"objective {i}": 1.0 / m for i in range(m)}
    found = {
        "raco": Solver(lambda M: solve_dual(M, weights, C), matrices, lambda s: s.p),
        "raco, C++ alone": Solver(lambda M: _C.solve(M, w, C, rule), matrices, lambda s: s[:m]),
    }
    if m <= 3:
        lists = [M.tolist() for M in matrices]
        found["closed form"] = Solver(closed_form, lists, np.asarray)
    if optional.obstacle("slsqp") is None:
        found["slsqp"] = Solver(lambda M: slsqp(M, w), matrices, np.asarray)
    if optional.obstacle("torchjd") is None:
        from torchjd.aggregation import CAGradWeighting

        tensors = [torch.tensor(M) for M in matrices]
        found["torchjd"] = Solver(CAGradWeighting(c=C), tensors, _direction)
    return found


def rule_solvers(rule: str, m: int) -> dict[str, Solver]:
    """The same for another rule; `p` are its coefficients for equal weights.

    TorchJD's UPGrad and DualProj need a quadratic programme solver that is not installed here.
    """
    matrices, weights, losses = grams(m), [1.0 / m] * m, [1.0] * m
    found = {
        "raco": Solver(
            lambda M: solve_dual(M, weights, C, rule, losses=losses), matrices, _coefficients
        )
    }
    if optional.obstacle("torchjd") is None:
        from torchjd import aggregation

        theirs = {
            "imtl-g": aggregation.IMTLGWeighting,
            "aligned-mtl": aggregation.AlignedMTLWeighting,
            "fairgrad": partial(aggregation.FairGradWeighting, alpha=2.0),
        }
        if rule in theirs:
            tensors = [torch.tensor(M) for M in matrices]
            found["torchjd"] = Solver(theirs[rule](), tensors, torch.Tensor.numpy)
    return found


def apart(solver: Solver, other: Solver, matrices: Sequence[np.ndarray]) -> float:
    """1 less the smallest cosine between the updates of two solvers."""
    cosines = []
    for M, x, y in zip(matrices, solver.inputs, other.inputs, strict=True):
        a, b = solver.p(solver.solve(x)), other.p(other.solve(y))
        cosines.append(a @ M @ b / np.sqrt((a @ M @ a) * (b @ M @ b)))
    return float(1.0 - min(cosines))


def _coefficients(solution: DualSolution) -> np.ndarray:
    return np.asarray(solution.coefficients)


def _direction(coefficients: torch.Tensor) -> np.ndarray:
    """p of TorchJD's w + (s/‖Gp‖) p, for equal weights."""
    p = coefficients.numpy() - 1.0 / len(coefficients)
    return np.asarray(p / p.sum())


def slsqp(M: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The user's own loop: f, its gradient, the simplex, and SciPy's defaults otherwise."""
    from scipy.optimize import minimize

    b, s = M @ w, C * np.sqrt(w @ M @ w)

    def f(p: np.ndarray) -> float:
        return float(b @ p + s * np.sqrt(p @ M @ p))

    def slope(p: np.ndarray) -> np.ndarray:
        product = M @ p
        return np.asarray(b + s * product / np.sqrt(p @ product))

    simplex = {"type": "eq", "fun": lambda p: p.sum() - 1.0, "jac": np.ones_like}
    found = minimize(
        f, w, jac=slope, bounds=[(0.0, 1.0)] * len(w), constraints=simplex, method="SLSQP"
    )
    return np.asarray(found.x)


def closed_form(M: list[list[float]]) -> list[float]:
    """p for two or three objectives of equal weights, in plain Python."""
    m = len(M)
    if m == 2:
        (first, both), (_, second) = M
        b = [(first + both) / 2, (both + second) / 2]
        return _on_edge(M, b, C * sqrt((b[0] + b[1]) / 2), 0, 1)
    b = [sum(row) / m for row in M]
    s = C * sqrt(sum(b) / m)
    faces = [_on_edge(M, b, s, i, j) for i in range(m) for j in range(i + 1, m)]
    if m == 3 and (inside := _inside_triangle(M, b, s)) is not None:
        faces.append(inside)

    def f(p: list[float]) -> float:
        product = [sum(a * x for a, x in zip(row, p, strict=True)) for row in M]
        square = sum(x * y for x, y in zip(p, product, strict=True))
        return sum(x * y for x, y in zip(b, p, strict=True)) + s * sqrt(max(0.0, square))

    return min(faces, key=f)


def _on_edge(M: list[list[float]], b: list[float], s: float, i: int, j: int) -> list[float]:
    """p = t e_i + (1 − t) e_j, where the slope of d t + s √(A t² + 2 B t + M_jj) is zero."""
    A, B = M[i][i] - 2 * M[i][j] + M[j][j], M[i][j] - M[j][j]
    d, D = b[i] - b[j], max(0.0, (M[i][i] * M[j][j] - M[i][j] ** 2))
    steep = s * s * A - d * d
    if A <= 0 or steep <= 0:
        t = 1.0 if d < 0 else 0.0
    else:
        u = -d * sqrt(D / steep)
        t = min(1.0, max(0.0, (u - B) / A))
    p = [0.0] * len(M)
    p[i], p[j] = t, 1.0 - t
    return p


def _inside_triangle(M: list[list[float]], b: list[float], s: float) -> list[float] | None:
    """p = κ (λ M⁻¹1 − w), where (λ1 − b)ᵀM⁻¹(λ1 − b) = s²; None if that is outside."""
    (A, B, C_), (_, D, E), (_, _, F) = M
    rows = (
        (D * F - E * E, C_ * E - B * F, B * E - C_ * D),
        (C_ * E - B * F, A * F - C_ * C_, B * C_ - A * E),
        (B * E - C_ * D, B * C_ - A * E, A * D - B * B),
    )
    determinant = A * rows[0][0] + B * rows[0][1] + C_ * rows[0][2]
    if determinant <= 0:
        return None
    ones = [sum(row) / determinant for row in rows]
    a = sum(ones)
    inside = 1.0 - a * (sum(b) / 3 - s * s)
    if a <= 0 or inside <= 0:
        return None
    p = [((1.0 + sqrt(inside)) / a * x - 1.0 / 3) / sqrt(inside) for x in ones]
    return p if min(p) >= 0 else None
