"""Time of the Gram and of a whole optimizer step on a CPU, in float32.

    OMP_NUM_THREADS=2 python -m pytest bench/test_bench_step.py --benchmark-enable

For each number of objectives m, on one list of `MILLIONS` million parameters with the gradients
already there:

    raco            ClippedCAGradAdamW.step: Gram, dual, combination and AdamW on the C++ kernels
    raco-reference  the same on the plain-torch backend
    paper           per-parameter (a * b).sum(), solve, per-parameter combination, then torch's
                    fused AdamW: the paper's arithmetic
    paper-dot       the same with torch.dot and in-place sums: what per-parameter torch can do
    adamw           torch's fused AdamW on one gradient: the price of one objective

Bytes that must move per parameter: adamw 28 (reads 4 numbers, writes 3), raco 8 m + 24 (the
gradients twice). Goals at m = 2: raco at most 1.6 adamw and at most half of paper. One table of
pytest-benchmark times each rival alone; `test_interleaved` (seen with -s) takes them in turn, so
that what else runs on the machine hits them alike, says how loaded it was and ends in one JSON
line. Nothing is asserted about time. All rivals must first take the same step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raco_fast import ClippedCAGradAdamW, ops, solve_dual

MILLIONS = 50
OBJECTIVES = (2, 4)
ROUNDS = 11
C = 0.4
ADAMW = {"lr": 1e-4, "weight_decay": 0.01}


def shapes(millions: float) -> list[tuple[int, ...]]:
    """A small Llama's parameter list: an embedding and layers of width 768."""
    d = 768
    layer = [(d,), (d, d), (d // 3, d), (d // 3, d), (d, d), (d,), (2048, d), (2048, d), (d, 2048)]
    layers = max(1, round(millions * 1e6 * 0.7 / sum(int(np.prod(s)) for s in layer)))
    rest = millions * 1e6 - layers * sum(int(np.prod(s)) for s in layer)
    return [(max(1, int(rest / d)), d), *layer * layers]


def random(sizes: list[tuple[int, ...]], seed: int, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(s, generator=generator) for s in sizes]


class Problem:
    """m gradients and, for each rival, its own parameters with the same start."""

    def __init__(self, m: int, millions: float) -> None:
        sizes = shapes(millions)
        self.m = m
        self.grads = [random(sizes, i, 1e-3) for i in range(m)]
        self.weights = [1.0 / m] * m
        start = random(sizes, 99, 0.02)
        self.ours = [nn.Parameter(p.clone()) for p in start]
        self.theirs = [nn.Parameter(p.clone()) for p in start]
        self.raco = ClippedCAGradAdamW(self.ours, **ADAMW, weights=self.weights, c=C)
        self.adamw = torch.optim.AdamW(self.theirs, **ADAMW, fused=True)
        for i, name in enumerate(self.raco.objective_names):
            with self.raco.objective(name):
                for p, g in zip(self.ours, self.grads[i], strict=True):
                    p.grad = g

    def reset(self) -> None:
        """Back to the start, before the first step."""
        for p, q, s in zip(
            self.ours, self.theirs, random(shapes_of(self.ours), 99, 0.02), strict=True
        ):
            p.data.copy_(s)
            q.data.copy_(s)
        self.raco.state.clear()
        self.adamw.state.clear()

    def step(self) -> None:
        self.raco.step()

    def step_on_reference(self) -> None:
        with ops.backend("reference"):
            self.raco.step()

    def step_of_adamw(self) -> None:
        for p, g in zip(self.theirs, self.grads[0], strict=True):
            p.grad = g
        self.adamw.step()

    def step_of_paper(self) -> None:
        alpha = self.coefficients(lambda a, b: (a * b).sum())
        for k, p in enumerate(self.theirs):
            g0 = alpha[0] * self.grads[0][k]
            for i in range(1, self.m):
                g0 = g0 + alpha[i] * self.grads[i][k]
            p.grad = g0
        self.adamw.step()

    def step_of_paper_with_dot(self) -> None:
        alpha = self.coefficients(lambda a, b: torch.dot(a.flatten(), b.flatten()))
        for k, p in enumerate(self.theirs):
            p.grad = alpha[0] * self.grads[0][k]
            for i in range(1, self.m):
                p.grad.add_(self.grads[i][k], alpha=alpha[i])
        self.adamw.step()

    def coefficients(self, dot: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        M = torch.zeros(self.m, self.m)
        for i in range(self.m):
            for j in range(i, self.m):
                for a, b in zip(self.grads[i], self.grads[j], strict=True):
                    M[i, j] += dot(a, b)
                M[j, i] = M[i, j]
        return solve_dual(M, self.weights, C).coefficients.tolist()

    def gram(self) -> None:
        ops.gram(self.grads)

    def gram_on_reference(self) -> None:
        with ops.backend("reference"):
            ops.gram(self.grads)


RIVALS: dict[str, Callable[[Problem], None]] = {
    "raco": Problem.step,
    "raco-reference": Problem.step_on_reference,
    "paper": Problem.step_of_paper,
    "paper-dot": Problem.step_of_paper_with_dot,
    "adamw": Problem.step_of_adamw,
    "gram": Problem.gram,
    "gram-reference": Problem.gram_on_reference,
}


def shapes_of(tensors: list[nn.Parameter]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


@cache
def problem_of(m: int, millions: float) -> Problem:
    return Problem(m, millions)


@pytest.mark.parametrize("m", OBJECTIVES)
def test_rivals_take_the_same_step(m: int) -> None:
    problem = Problem(m, 1.0)
    assert "backend: cpu\n" in repr(problem.raco)
    results = []
    for name in ("raco", "raco-reference", "paper", "paper-dot"):
        problem.reset()
        RIVALS[name](problem)
        stepped = problem.ours if name.startswith("raco") else problem.theirs
        results.append(torch.cat([p.detach().flatten() for p in stepped]))
    for other in results[1:]:
        # The mean: the first step is lr * sign(G0), and a small G0 may round to either sign.
        assert (other - results[0]).abs().mean() <= 1e-3 * ADAMW["lr"]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("m", OBJECTIVES)
def test_alone(benchmark: Any, m: int, name: str) -> None:
    benchmark.group = f"{'gram' if name.startswith('gram') else 'step'}, m = {m}"
    problem = problem_of(m, MILLIONS if benchmark.enabled else 0.1)
    benchmark.extra_info["load"] = os.getloadavg()[0]
    benchmark.pedantic(RIVALS[name], args=(problem,), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("m", OBJECTIVES)
def test_interleaved(benchmark: Any, m: int) -> None:
    benchmark.group = f"all in turn, m = {m}"
    problem = problem_of(m, MILLIONS if benchmark.enabled else 0.1)
    seconds: dict[str, list[float]] = {name: [] for name in RIVALS}

    def one_round() -> None:
        for name, call in RIVALS.items():
            started = perf_counter()
            call(problem)
            seconds[name].append(perf_counter() - started)

    loads = [os.getloadavg()[0]]
    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    loads.append(os.getloadavg()[0])
    report(problem, {name: taken[1:] or taken for name, taken in seconds.items()}, loads)


def report(problem: Problem, seconds: dict[str, list[float]], loads: list[float]) -> None:
    conditions = {
        "m": problem.m,
        "parameters": sum(p.numel() for p in problem.ours),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": loads,
    }
    print("\n" + ", ".join(f"{name} {value}" for name, value in conditions.items()))
    one = seconds["adamw"]
    for name, taken in seconds.items():
        low, middle, high = np.quantile(taken, [0.2, 0.5, 0.8])
        print(
            f"  {name:15} p20 {1e3 * low:7.1f}  p50 {1e3 * middle:7.1f}  p80 {1e3 * high:7.1f} ms"
            f"  {middle / np.median(one):5.2f} x adamw (fastest: {min(taken) / min(one):5.2f})"
        )
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    print(json.dumps({**conditions, "median_s": medians}))
