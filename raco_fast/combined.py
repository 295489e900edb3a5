"""`combine`: the common update direction in p.grad, for any torch optimizer."""

from __future__ import annotations

import torch

from raco_fast import ops
from raco_fast.dual import DualSolution, solve_dual
from raco_fast.gradients import ObjectiveGradients


def clip_factor(norm: float, max_grad_norm: float | None) -> float:
    """The factor of `torch.nn.utils.clip_grad_norm_` for a gradient whose norm is known."""
    return 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raise ValueError unless `max_grad_norm` is None or a positive number."""
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(
            f"`max_grad_norm` must be a positive number, got {max_grad_norm}; "
            f"None switches clipping off"
        )


def combine(
    gradients: ObjectiveGradients,
    *,
    c: float = 0.4,
    rule: str = "cagrad-clip",
    max_grad_norm: float | None = None,
) -> DualSolution:
    """Write the common update direction G0 = Σ α_i g_i into p.grad, for any torch optimizer.

    The per-objective gradients are used up: G0 takes their place, so zero the gradients before
    the next backward pass as usual (`optimizer.zero_grad()` or `gradients.zero()`).
    If a gradient is not finite, every p.grad becomes None, so that the optimizer's next step
    changes nothing, and the solution says `finite=False`.

    Args:
        gradients: accumulated gradients of every objective.
        c: radius, 0 <= c < 1.
        rule: "linear", "cagrad", "cagrad-clip" or "mgda".
        max_grad_norm: clip ‖G0‖ to this, as `torch.nn.utils.clip_grad_norm_` does; its factor is
            not part of the solution's coefficients.
    Raises:
        ValueError: wrong `c`, `rule` or `max_grad_norm`.
        RuntimeError: an objective has had no backward pass.
    Source: arXiv 2602.02495, Algorithm 1.
    """
    check_max_grad_norm(max_grad_norm)
    ((params, grads),) = gradients.collect()
    solution = solve_dual(ops.gram(grads), gradients.weights, c, rule)
    if not solution.finite:
        gradients.zero()
        return solution
    out = [next(g for g in column if g is not None) for column in zip(*grads, strict=True)]
    factor = clip_factor(float(solution.update_norm), max_grad_norm)
    with torch.no_grad():
        ops.combine(grads, torch.as_tensor(solution.coefficients) * factor, out)
    for p, g in zip(params, out, strict=True):
        p.grad = g
    gradients.forget()
    return solution
