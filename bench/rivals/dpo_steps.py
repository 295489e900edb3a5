"""One optimizer step of multi-objective DPO, the plain way and every way this library offers."""

from collections.abc import Callable

import torch

import raco_fast
from bench.harness.dpo_problem import Problem
from bench.harness.timing import Call
from raco_fast.engine.tap import Checks

ADAMW = {"lr": 1e-5, "weight_decay": 0.0}
"""Of every contestant. Without decay: TRL's trainer leaves it out for biases and norms only."""

UNPREPARED = ("plain", "passes", "torchjd")
"""The steps of a plain model; the others need a prepared one."""

Build = Callable[[Problem, int], Call]
"""(problem, m) -> one whole step with m objectives."""


def _with_torch(backward: Callable[[Problem, int], None]) -> Build:
    """A step of torch's fused AdamW along what `backward` leaves in `p.grad`."""

    def build(problem: Problem, m: int) -> Call:
        optimizer = torch.optim.AdamW(problem.params, **ADAMW, fused=True)

        def step() -> None:
            backward(problem, m)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


def plain(problem: Problem, m: int) -> None:
    """Plain DPO, whatever m: one loss, one backward pass. The unit of every figure."""
    problem.losses(problem.scores(), 1)[0].backward()


def passes(problem: Problem, m: int) -> None:
    """m passes as published code has them: autograd.grad with retain_graph, dots by parameter."""
    losses = problem.losses(problem.scores(), m)
    grads = [torch.autograd.grad(loss, problem.params, retain_graph=True) for loss in losses]
    M = torch.zeros(m, m, dtype=torch.float64)
    for i in range(m):
        for j in range(i, m):
            dots = [(a * b).sum() for a, b in zip(grads[i], grads[j], strict=True)]
            M[i, j] = M[j, i] = float(sum(dots))
    alpha = raco_fast.solve_dual(M, [1 / m] * m, 0.4).coefficients.tolist()
    for p, *column in zip(problem.params, *grads, strict=True):
        p.grad = sum(a * g for a, g in zip(alpha, column, strict=True))


def torchjd(problem: Problem, m: int) -> None:
    """TorchJD's engine and its CAGrad (cvxpy and Clarabel), the memory-saving way it recommends.

    One loss after the other: its default, all at once under vmap, does not pass through autograd
    functions that have no rule for it, such as this head's.
    """
    from torchjd.aggregation import CAGrad
    from torchjd.autojac import backward, jac_to_grad

    losses = problem.losses(problem.scores(), m)
    backward(losses, inputs=problem.params, parallel_chunk_size=1)
    jac_to_grad(problem.params, CAGrad(c=0.4), optimize_gramian_computation=True)


def ours(mode: str, rule: str = "cagrad-clip", checked: bool = False, **options: bool) -> Build:
    """`ClippedCAGradAdamW` with one of its gradient modes; `checked`: spot-checked at each call."""

    def build(problem: Problem, m: int) -> Call:
        optimizer = raco_fast.ClippedCAGradAdamW(
            problem.params, **ADAMW, weights=[1 / m] * m, rule=rule
        )
        if checked:
            optimizer.gradients.exactness.checks = Checks(strict=True, every=1)

        def step() -> None:
            scores = problem.scores()
            losses = problem.losses(scores, m)
            optimizer.backward(losses, scores=scores, mode=mode, **options)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.skipped_steps == 0  # a step that did nothing would be timed

        return step

    return build


STEPS: dict[str, Build] = {
    "plain": _with_torch(plain),
    "passes": _with_torch(passes),
    "torchjd": _with_torch(torchjd),
    "autograd": ours("autograd"),
    "one_backward": ours("one_backward"),
    "one_backward, checked": ours("one_backward", checked=True),
    "gram_first": ours("gram_first"),
    "gram_first, keep_dy": ours("gram_first", keep_dy=True),
    "gram_first, step_in_backward": ours("gram_first", step_in_backward=True),
}


def disagreement(problem: Problem, m: int) -> float:
    """Largest relative error of a parameter's m gradients, one backward pass against m.

    Args:
        problem: with a prepared model.
    """
    found = []
    for scored in (False, True):
        problem.model.zero_grad()
        gradients = raco_fast.ObjectiveGradients(problem.params, [1 / m] * m)
        scores = problem.scores()
        gradients.backward(problem.losses(scores, m), scores=scores if scored else None)
        found.append([torch.stack(list(gradients.of(p).values())) for p in problem.params])
    problem.model.zero_grad()
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
