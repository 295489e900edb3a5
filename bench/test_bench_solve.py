"""Time of one dual problem: `_C.solve`, `solve_dual`, TorchJD's CAGradWeighting and SciPy's SLSQP.

    python -m pytest bench/test_bench_solve.py --benchmark-enable --import-mode=importlib

The goals for `_C.solve` called from Python are 1.5, 5, 20 and 100 us at m = 2, 4, 8 and 16, and
`solve_dual` at most 10 us more. Nothing is asserted about time. Every rival must first agree with
`solve_dual` on the problems it is timed on, as far as its own accuracy goes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torchjd.aggregation import CAGradWeighting

from raco_fast import _C
from raco_fast.dual import RULES, solve_dual

SIZES = (2, 4, 8, 16, 32)
C = 0.4


def grams(m: int) -> list[np.ndarray]:
    """Sixteen Grams of m gradients whose cosines vary between conflict and agreement."""
    rng = np.random.default_rng(m)
    matrices = []
    for _ in range(16):
        G = rng.standard_normal((m, 2 * m)) * rng.uniform(0.3, 3.0, (m, 1))
        matrices.append(G @ G.T)
    return [np.tril(M) + np.tril(M, -1).T for M in matrices]


def slsqp(M: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The user's own loop: f, its gradient, the simplex, and SciPy's defaults otherwise."""
    b, s = M @ w, C * np.sqrt(w @ M @ w)

    def value(p: np.ndarray) -> float:
        return float(b @ p + s * np.sqrt(p @ M @ p))

    def slope(p: np.ndarray) -> np.ndarray:
        product = M @ p
        return np.asarray(b + s * product / np.sqrt(p @ product))

    simplex = {"type": "eq", "fun": lambda p: p.sum() - 1.0, "jac": np.ones_like}
    found = minimize(
        value, w, jac=slope, bounds=[(0.0, 1.0)] * len(w), constraints=simplex, method="SLSQP"
    )
    return np.asarray(found.x)


def run(benchmark: Any, m: int, solver: Callable[[Any], Any], inputs: list[Any]) -> None:
    """One call a round over inputs in turn, so that no solver is timed on one lucky Gram."""
    benchmark.group = f"m = {m:2d}"
    turn = cycle(inputs)
    benchmark(lambda: solver(next(turn)))


@pytest.mark.parametrize("m", SIZES)
def test_extension(benchmark: Any, m: int) -> None:
    w, number, turn = np.full(m, 1.0 / m), RULES.index("cagrad-clip"), cycle(grams(m))
    benchmark.group = f"m = {m:2d}"
    benchmark(lambda: _C.solve(next(turn), w, C, number))  # one Python call less than `run`


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("m", SIZES)
def test_solve_dual(benchmark: Any, m: int, kind: str) -> None:
    weights = {f"objective {i}": 1.0 / m for i in range(m)}
    inputs = [torch.tensor(M) if kind == "torch" else M for M in grams(m)]
    assert solve_dual(inputs[0], weights, C).converged
    run(benchmark, m, lambda M: solve_dual(M, weights, C), inputs)


@pytest.mark.parametrize("m", SIZES)
def test_torchjd(benchmark: Any, m: int) -> None:
    weighting = CAGradWeighting(c=C)  # equal weights; its coefficients are w + s p / ||Gp||
    inputs = [torch.tensor(M) for M in grams(m)]
    expected = solve_dual(inputs[0], [1.0 / m] * m, C, "cagrad").coefficients
    torch.testing.assert_close(weighting(inputs[0]), expected, rtol=1e-3, atol=1e-3)
    run(benchmark, m, weighting, inputs)


@pytest.mark.parametrize("m", SIZES)
def test_slsqp(benchmark: Any, m: int) -> None:
    w = np.full(m, 1.0 / m)
    inputs = grams(m)
    expected = solve_dual(inputs[0], w, C).p
    np.testing.assert_allclose(slsqp(inputs[0], w), expected, rtol=0, atol=1e-2)
    run(benchmark, m, lambda M: slsqp(M, w), inputs)
