"""One optimizer step of multi-objective DPO, the plain way and every way this library offers."""

from __future__ import annotations

from collections.abc import Callable

import torch

import raco_fast
from bench.harness.dpo_problem import Problem
from raco_fast.engine.exactness import Exactness
from raco_fast.engine.tap import Checks

UNPREPARED = ("plain", "passes", "torchjd")
"""The steps that know nothing of this library's engine; the others want a prepared model."""


def plain(problem: Problem, m: int) -> Callable[[], None]:
    """Plain DPO: one loss, one backward pass, torch's fused AdamW. The unit of every figure."""
    optimizer = torch.optim.AdamW(problem.params, lr=1e-6, fused=True)

    def step() -> None:
        problem.losses(problem.scores(), 1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def passes(problem: Problem, m: int) -> Callable[[], None]:
    """m passes as published code has them: autograd.grad with retain_graph, dots by parameter."""
    optimizer = torch.optim.AdamW(problem.params, lr=1e-6, fused=True)
    weights = [1 / m] * m

    def step() -> None:
        losses = problem.losses(problem.scores(), m)
        grads = [torch.autograd.grad(loss, problem.params, retain_graph=True) for loss in losses]
        M = torch.zeros(m, m, dtype=torch.float64)
        for i in range(m):
            for j in range(i, m):
                dots = [(a * b).sum() for a, b in zip(grads[i], grads[j], strict=True)]
                M[i, j] = M[j, i] = float(sum(dots))
        alpha = raco_fast.solve_dual(M, weights, 0.4).coefficients.tolist()
        for p, *column in zip(problem.params, *grads, strict=True):
            p.grad = sum(a * g for a, g in zip(alpha, column, strict=True))
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchjd(problem: Problem, m: int) -> Callable[[], None]:
    """TorchJD's engine and its CAGrad (cvxpy and Clarabel), the memory-saving way it recommends.

    One loss after the other: its default, all at once under vmap, does not pass through autograd
    functions that have no rule for it, such as this head's.
    """
    from torchjd.aggregation import CAGrad
    from torchjd.autojac import backward, jac_to_grad

    optimizer = torch.optim.AdamW(problem.params, lr=1e-6, fused=True)

    def step() -> None:
        losses = problem.losses(problem.scores(), m)
        backward(losses, inputs=problem.params, parallel_chunk_size=1)
        jac_to_grad(problem.params, CAGrad(c=0.4), optimize_gramian_computation=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    mode: str, check_every: int | None = None, **options: bool
) -> Callable[[Problem, int], Callable[[], None]]:
    """`ClippedCAGradAdamW` with one of its gradient modes; checked every so many calls."""

    def build(problem: Problem, m: int) -> Callable[[], None]:
        optimizer = raco_fast.ClippedCAGradAdamW(problem.params, lr=1e-6, weights=[1 / m] * m)
        optimizer.gradients.exactness = Exactness(Checks(strict=True, every=check_every))

        def step() -> None:
            scores = problem.scores()
            losses = problem.losses(scores, m)
            optimizer.backward(losses, scores=scores, mode=mode, **options)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


STEPS: dict[str, Callable[[Problem, int], Callable[[], None]]] = {
    "plain": plain,
    "passes": passes,
    "torchjd": torchjd,
    "autograd": ours("autograd"),
    "one_backward": ours("one_backward"),
    "one_backward, checked": ours("one_backward", check_every=1),
    "gram_first": ours("gram_first"),
    "gram_first, keep_dy": ours("gram_first", keep_dy=True),
    "gram_first, step_in_backward": ours("gram_first", step_in_backward=True),
}
"""Name -> (problem, m) -> one whole step."""


def disagreement(problem: Problem, m: int) -> float:
    """Largest relative error of a parameter's m gradients, one backward pass against m.

    Args:
        problem: with a prepared model.
    """
    found = []
    for scored in (False, True):
        problem.clear()
        gradients = raco_fast.ObjectiveGradients(problem.params, [1 / m] * m)
        scores = problem.scores()
        gradients.backward(problem.losses(scores, m), scores=scores if scored else None)
        found.append([torch.stack(list(gradients.of(p).values())) for p in problem.params])
    problem.clear()
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    return max(errors)
