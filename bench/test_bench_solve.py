"""Micro-benchmarks of one dual problem (pytest-benchmark); the contestants of `suites/solve.py`.

    python -m pytest bench/test_bench_solve.py --benchmark-enable --import-mode=importlib

Nothing is asserted about time. Every contestant must first come close to the optimum.
"""

from itertools import cycle
from typing import Any

import pytest

from bench.rivals.dual_solvers import SIZES, grams, solvers, value

CASES = [(m, name) for m in SIZES for name in solvers(m)]


@pytest.mark.parametrize(("m", "name"), CASES)
def test_solver(benchmark: Any, m: int, name: str) -> None:
    solver, ours = solvers(m)[name], solvers(m)["raco"]
    for M, x, y in zip(grams(m), solver.inputs, ours.inputs, strict=True):
        excess = value(M, solver.p(solver.solve(x))) - value(M, ours.p(ours.solve(y)))
        assert excess <= 1e-3 * abs(M).max()
    benchmark.group = f"m = {m:2d}"
    turn, solve = cycle(solver.inputs), solver.solve
    benchmark(lambda: solve(next(turn)))  # in turn: one Gram may be easy
