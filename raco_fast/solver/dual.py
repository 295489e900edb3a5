"""Gram matrix -> `DualSolution`: how much of each objective's gradient goes into the update.

Algorithm 1 of arXiv 2602.02495 and its relatives are solved in csrc/ (dual.hpp states the
certificate, active_set.hpp the method, `reference.py` has it in plain numpy); other rules are in
rules/. This file checks the matrix for all of them; `solution.py` gives the numbers names.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from raco_fast import _C
from raco_fast.solver.apply import apply, checked_losses, checked_state
from raco_fast.solver.registry import RuleLike, check_rule, label_of
from raco_fast.solver.rule import Problem, Rule, State
from raco_fast.solver.rules.conflict_averse import DualRule, Linear
from raco_fast.solver.solution import (
    ASYMMETRIC,
    CLIP_ACTIVE,
    COLUMN,
    GAP,
    GP_NORM,
    NEGATIVE_DIAGONAL,
    NON_FINITE,
    NOT_GRAM,
    ROW,
    STATUS,
    UPDATE_NORM,
    VALUE,
    DualSolution,
)
from raco_fast.solver.weights import Weights, check_c, checked_weights

Array: TypeAlias = NDArray[np.float64] | torch.Tensor

_LINEAR = Linear()


def solve_dual(
    gram: Array | Sequence[Any],
    weights: Weights,
    c: float,
    rule: RuleLike = "cagrad-clip",
    *,
    losses: Array | Sequence[Any] | None = None,
    state: State | None = None,
) -> DualSolution:
    """Find the coefficients of one Gram matrix, or of a batch of them in one call.

    Args:
        gram: [m, m] or [n, m, m], M_ij = <g_i, g_j>, 1 <= m <= 32; tensor (any device), array or
            nested lists. Any scale. A Gram that is not finite is not an error (`finite` is False).
        weights: [m], on the simplex; see `check_weights`.
        c: radius in [0, 1) of "cagrad" and "cagrad-clip"; other rules do not use it.
        rule: "cagrad-clip" (RACO; docs/rules.md has clips of our own), "cagrad", "linear"
            (coefficients = weights), "mgda" (coefficients = argmin over the simplex of ||Gp||),
            another name of docs/rules.md, {"name": name, option: value}, or a `raco_fast.Rule`.
        losses: [m] or [n, m], for rules that need them.
        state: of a rule with a memory, `state` of the solution before; None begins anew. Every
            problem of a batch begins from it, and a batch leaves none.
    Returns:
        `DualSolution`; of the four rules named first exact to rounding, and of several minimisers
        the one closest to the weights. g0 = 0 gives p = weights and no correction. The problems of
        a batch do not touch each other: what is wrong with one makes its own results NaN, and its
        `status` says why. Losses that are not finite count as a Gram that is not.
    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the only matrix is no Gram matrix
            (asymmetric, negative on the diagonal, |M_ij| > ||g_i|| ||g_j||).
    Source: arXiv 2602.02495, Algorithm 1, lines 6-8; docs/rules.md for other rules.
    """
    names, _, array = checked_weights(weights)
    c = check_c(c)
    rule = check_rule(rule)
    m = len(names)
    tensor = isinstance(gram, torch.Tensor)
    matrix = _as_float64(gram)
    if matrix.ndim not in (2, 3) or matrix.shape[-2:] != (m, m):
        raise ValueError(
            f"`gram` must be [m, m] or [n, m, m] with m = {m} (one row a weight), "
            f"got shape {matrix.shape}; pass one weight an objective"
        )
    certified = rule if isinstance(rule, DualRule) else None
    packed = _C.solve(matrix, array, c, *(certified or _LINEAR).asked)
    if packed.ndim == 1:
        _raise_for_status(matrix, packed[3 * m :])
    if certified is not None:
        if state:
            checked_state(certified, m, state)  # raises: these rules have none
        return DualSolution(names, array, c, label_of(certified), matrix, packed, tensor)
    after = _apply(rule, matrix, packed, array, c, losses, state)
    return DualSolution(names, array, c, label_of(rule), matrix, packed, tensor, after)


def solve_present(
    gram: torch.Tensor,
    weights: Mapping[str, float],
    present: Sequence[str],
    c: float,
    rule: RuleLike,
    *,
    losses: Mapping[str, float] | None = None,
    state: State | None = None,
) -> DualSolution:
    """`solve_dual` for the objectives `present`; the others, of weight 0, are zeros in its arrays.

    An objective without a loss is left out, as a gradient of zero would attract p. Of a rule's
    state its part stays as it was.

    Args:
        gram: [m, m], of all objectives.
        weights: of all objectives.
        present: some of their names, in the same order.
        c, rule: as in `solve_dual`.
        losses: of the objectives present, for rules that need them.
        state: of all objectives.
    """
    names, rule = tuple(weights), check_rule(rule)
    values = None if losses is None else [losses[name] for name in present]
    if len(present) == len(names):
        return solve_dual(gram, weights, c, rule, losses=values, state=state)
    places = [names.index(name) for name in present]
    whole = state or rule.initial_state(len(names))
    part = solve_dual(
        gram[places][:, places],
        {name: weights[name] for name in present},
        c,
        rule,
        losses=values,
        state={key: value[_of(places, value)] for key, value in whole.items()},
    )
    solution = part.among(names)
    solution.state = {key: value.copy() for key, value in whole.items()}
    for key, value in part.state.items():
        solution.state[key][_of(places, value)] = value
    return solution


def _of(places: list[int], value: NDArray[np.float64]) -> Any:
    """The index of some objectives' part of one value of a state."""
    return np.ix_(*[places] * value.ndim) if value.ndim else ()


def _apply(
    rule: Rule,
    matrix: NDArray[np.float64],
    packed: NDArray[np.float64],
    weights: NDArray[np.float64],
    c: float,
    losses: Any,
    state: State | None,
) -> State:
    """Put a rule's coefficients where "linear" was solved; returns the state to go on from."""
    m, before = len(weights), checked_state(rule, len(weights), state)
    rows, M = packed.reshape(-1, 3 * m + _C.SCALARS), matrix.reshape(-1, m, m)
    values = checked_losses(rule, losses, len(rows), m)
    if values is not None:
        lost = ~np.isfinite(values).all(1)
        rows[lost] = np.nan
        rows[lost, 3 * m + STATUS] = NON_FINITE
    rows[:, : 2 * m] = np.nan
    rows[:, [3 * m + k for k in (GAP, VALUE, GP_NORM, CLIP_ACTIVE)]] = np.nan
    fine = rows[:, 3 * m + STATUS] == 0.0
    M = (M[fine] + M[fine].swapaxes(1, 2)) * 0.5
    np.einsum("nii->ni", M)[:] = np.maximum(np.einsum("nii->ni", M), 0.0)
    problem = Problem(M, weights, c, None if values is None else values[fine])
    coefficients, norms, after = apply(rule, problem, before)
    rows[fine, 2 * m : 3 * m], rows[fine, 3 * m + UPDATE_NORM] = coefficients, norms
    return after if packed.ndim == 1 else {}


def _as_float64(gram: Array | Sequence[Any]) -> NDArray[np.float64]:
    """A float64 copy in row-major order, so that a solution does not change with its input."""
    if isinstance(gram, torch.Tensor):
        if gram.dtype is not torch.float64 or gram.requires_grad or not gram.is_cpu:
            if gram.is_complex():
                raise TypeError("`gram` must be real, got a complex tensor; pass gram.real")
            gram = gram.detach().to("cpu", torch.float64)
        return np.array(gram.numpy(), order="C")
    try:
        return np.array(gram, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise TypeError(f"`gram` must be a matrix of real numbers ({error}); pass [m, m]") from None


def _raise_for_status(M: NDArray[np.float64], scalars: NDArray[np.float64]) -> None:
    status, i, j = (int(scalars[k]) for k in (STATUS, ROW, COLUMN))
    if not NEGATIVE_DIAGONAL <= status <= NOT_GRAM:
        return
    a = f"gram[{i}, {j}] = {M[i, j]:g}"
    if status == NEGATIVE_DIAGONAL:
        rule, cure = "have a non-negative diagonal", "a squared norm cannot be negative"
    elif status == ASYMMETRIC:
        a += f" and gram[{j}, {i}] = {M[j, i]:g}"
        rule, cure = "be symmetric", "pass G @ G.T, or the average with its transpose"
    else:
        a += f" with diagonal entries {M[i, i]:g} and {M[j, j]:g}"
        rule, cure = "satisfy |M_ij| <= sqrt(M_ii M_jj)", "use the same gradients for all"
    raise ValueError(f"`gram` must {rule}, got {a}; {cure}")
