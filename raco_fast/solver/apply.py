"""A rule without a certificate, applied to the problems of a call; what goes in and out."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule, State, size


def apply(rule: Rule, problem: Problem, state: State) -> tuple[Array, Array, State]:
    """(coefficients [n, m], norms of the updates [n], the state to go on from).

    A rule with a memory is asked for one problem at a time, each from `state`; the state of the
    only problem is returned, and `state` after a batch.
    """
    n, m = problem.gram.shape[:2]
    if n == 0:
        return np.zeros((0, m)), np.zeros(0), state
    if not state:
        found = _checked(rule, rule.step(problem, state)[0], (n, m))
        return found, size(problem.gram, found), state
    coefficients = np.empty((n, m))
    for k in range(n):
        losses = None if problem.losses is None else problem.losses[k : k + 1]
        one = Problem(problem.gram[k : k + 1], problem.weights, problem.c, losses)
        found, after = rule.step(one, {key: value.copy() for key, value in state.items()})
        coefficients[k : k + 1] = _checked(rule, found, (1, m))
    after = checked_state(rule, m, after) if n == 1 else state
    return coefficients, size(problem.gram, coefficients), after


def checked_state(rule: Rule, m: int, state: Mapping[str, Any] | None) -> State:
    """A rule's state as float64 arrays, wherever it comes from; its first one for None or {}.

    Raises:
        ValueError: it is of another rule or of another number of objectives.
    """
    first = rule.initial_state(m)
    if not state:
        return first
    given = {key: np.array(value, dtype=np.float64) for key, value in state.items()}
    shapes, wanted = ({k: v.shape for k, v in values.items()} for values in (given, first))
    if shapes != wanted:
        raise ValueError(
            f"`state` must have {wanted} for {rule} and m = {m}, got {shapes}; None begins anew"
        )
    return given


def checked_losses(rule: Rule, losses: Any, n: int, m: int) -> Array | None:
    """[n, m] losses for a rule that needs them, None for others."""
    if not rule.needs_losses:
        return None
    if losses is None:
        raise ValueError(
            f"`losses` must be given, as {rule} needs them: solve_dual(..., losses=[m numbers]); "
            f"an optimizer sees them in opt.backward(losses)"
        )
    values = np.array(losses, dtype=np.float64)
    if values.shape not in ((m,), (n, m)):
        raise ValueError(f"`losses` must be [m] or [n, m] with m = {m}, got shape {values.shape}")
    return np.broadcast_to(values, (n, m))


def _checked(rule: Rule, coefficients: Any, shape: tuple[int, int]) -> Array:
    found: Array = np.asarray(coefficients, dtype=np.float64)
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError(
            f"the coefficients of a rule must be finite and [n, m] = {list(shape)}, got "
            f"{found.tolist()} from {rule}; no step has been taken"
        )
    return found
