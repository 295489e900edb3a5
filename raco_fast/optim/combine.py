"""`combine`: the common update direction in p.grad, for any torch optimizer."""

import torch

from raco_fast.gradients.norm_clip import along, clip_factor
from raco_fast.gradients.objective_grad import joined
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.gradients.overflow import leave_overflow
from raco_fast.solver.registry import RuleLike, check_rule, spec_of
from raco_fast.solver.solution import DualSolution
from raco_fast.solver.weights import check_max_grad_norm


def combine(
    gradients: ObjectiveGradients,
    *,
    c: float = 0.4,
    rule: RuleLike = "cagrad-clip",
    max_grad_norm: float | None = None,
) -> DualSolution:
    """Write the common update direction G0 = Σ α_i g_i into p.grad, for any torch optimizer.

    The per-objective gradients are used up: G0 takes their place, so zero the gradients before
    the next backward pass as usual (`optimizer.zero_grad()` or `gradients.zero()`).
    If a gradient is not finite, every p.grad becomes NaN, in which a GradScaler finds the overflow;
    an optimizer that steps all the same finds None there and changes nothing. The solution says
    `finite=False`.

    With a GradScaler, scale each loss and unscale when you like, before or after; `max_grad_norm`
    limits the norm of the unscaled direction. Rules whose coefficients change with the scale of the
    gradients (docs/rules.md) need `scaler.unscale_(optimizer)` before: their direction cannot be
    unscaled afterwards, and raises RuntimeError when a GradScaler does it all the same.

    Args:
        gradients: accumulated gradients of every objective; also say which Gram matrix is solved
            (`gram`), as passes have to know before.
        c: radius, 0 <= c < 1.
        rule: as for `raco_fast.solve_dual`. `gradients` keeps the state of one that has a memory,
            until another rule is asked for.
        max_grad_norm: clip ‖G0‖ to this, as `torch.nn.utils.clip_grad_norm_` does; its factor is
            not part of the solution's coefficients.
    Raises:
        ValueError: wrong `c`, `rule` or `max_grad_norm`; or `gradients` are those of an optimizer
            with metric="adam".
        RuntimeError: an objective has had no backward pass; or the rule needs losses that
            `gradients` has not seen or was not asked to keep.
    Source: arXiv 2602.02495, Algorithm 1.
    """
    max_grad_norm, rule = check_max_grad_norm(max_grad_norm), check_rule(rule)
    gradients.refuse_metric("combine")
    reduced = gradients.reduced()
    options = gradients.expectation.options
    settings = dict(gradients.weights), c, spec_of(rule), max_grad_norm, options
    M, _ = reduced.gram([], lambda: settings)
    solution = gradients.solve(M, c, rule)
    if not solution.finite:
        gradients.zero()
        leave_overflow(joined(reduced.groups).params)
        return solution
    norm = float(solution.update_norm)
    factor = clip_factor(norm, max_grad_norm)
    params, directions = reduced.combined(torch.as_tensor(solution.coefficients) * factor)
    gradients.zero()
    for p, g in zip(params, directions, strict=True):
        p.grad = along(g, norm, max_grad_norm, rule, unbiased=gradients.expectation.wanted)
    return solution
