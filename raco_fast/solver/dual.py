"""Gram matrix -> `DualSolution`: how much of each objective's gradient goes into the update.

Algorithm 1 of arXiv 2602.02495 and its relatives are solved in csrc/ (dual.hpp states the
certificate, active_set.hpp the method, `reference.py` has it in plain numpy); other rules are in
rules/. This file checks the matrix for all of them and gives the numbers names.
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
from raco_fast.solver.weights import Weights, check_c, checked_weights

Array: TypeAlias = NDArray[np.float64] | torch.Tensor

# The scalars behind p, p_clipped and coefficients in a packed row: enum Scalar of
# csrc/solver/dual.hpp.
_GAP, _VALUE, _G0_NORM, _GP_NORM, _UPDATE_NORM, _CLIP_ACTIVE, _STATUS, _ROW, _COLUMN = range(
    _C.SCALARS
)
_STATUSES = ("ok", "non_finite", "negative_diagonal", "asymmetric", "not_gram", "unconverged")
"""In the order of enum Status of csrc/solver/dual.hpp."""
_NON_FINITE, _NEGATIVE_DIAGONAL, _ASYMMETRIC, _NOT_GRAM = range(1, 5)


def _part(index: int, doc: str) -> property:
    """The values of one of the three arrays in a packed row."""

    def read(solution: "DualSolution") -> Any:
        m = len(solution.names)
        return solution._array(solution._packed[..., index * m : (index + 1) * m])

    return property(read, doc=doc)


def _scalar(index: int, doc: str) -> property:
    """One of the numbers behind them; an array of them for a batch."""

    def read(solution: "DualSolution") -> Any:
        values = solution._packed[..., 3 * len(solution.names) + index]
        return float(values) if values.ndim == 0 else solution._array(values)

    return property(read, doc=doc)


class DualSolution:
    """What `solve_dual` found, for one problem or a batch of n (then every value has a leading n).

    Arrays are float64, torch tensors on the CPU if the Gram was a tensor, numpy arrays otherwise.
    Scalars are Python numbers for one problem, arrays [n] for a batch.

    The rules "linear", "cagrad", "cagrad-clip" and "mgda" are the minimisers of a dual problem; of
    other rules there is no p, and p, p_clipped, gap, value and gp_norm are NaN, clip_active is
    None.

    Attributes:
        names, weights, c, rule: what was asked; weights is [m], rule its name with its options.
        gram: [m, m], the input as float64.
        p: [m], the minimiser of f on the simplex that is closest to the weights.
        p_clipped: [m], min(p, weights) under "cagrad-clip"; p under the other rules.
        coefficients: [m], the update is sum_i coefficients_i g_i.
        gap: certificate of optimality, f(p) - min_i y_i >= 0, in the unit of `value`.
        value: f(p) (under "mgda" the norm ||Gp||).
        g0_norm, gp_norm, update_norm: ||g0||, ||G p_clipped||, ||sum_i coefficients_i g_i||; a norm
            that is rounding error of its own terms is 0.
        clip_active: clipping changed the direction of Gp, and so the update. (Where p is not the
            weights some p_i exceeds w_i, but at a vertex of the simplex only the length changes.)
        finite: False when the Gram holds NaN or infinity; every other result is NaN then.
        converged: False if the solver stopped at its cap on steps (`gap` is valid all the same).
        status: what became of the problem, in a word; for a batch a numpy array of n of them:
            "ok"; "non_finite"; "unconverged"; or, in a batch only, why the matrix is no Gram matrix
            and every other result is NaN: "negative_diagonal", "asymmetric", "not_gram"
            (|M_ij| > ||g_i|| ||g_j||).
        cosines: [m, m] between gradients, 0 where a gradient is zero.
        state: what a rule with a memory goes on from; {} for others, and for a batch.
    """

    __slots__ = ("_gram", "_packed", "_tensor", "_weights", "c", "names", "rule", "state")

    def __init__(
        self,
        names: tuple[str, ...],
        weights: NDArray[np.float64],
        c: float,
        rule: str,
        gram: NDArray[np.float64],
        packed: NDArray[np.float64],
        tensor: bool,
        state: State | None = None,
    ) -> None:
        """Names the parts of packed [.., 3m + SCALARS]; `solve_dual` is the one that calls this."""
        self.names = names
        self.c = c
        self.rule = rule
        self.state = state or {}
        self._weights = weights
        self._gram = gram
        self._packed = packed
        self._tensor = tensor

    def _array(self, values: NDArray[np.float64]) -> Any:
        return torch.from_numpy(values.copy()) if self._tensor else values.copy()

    def _flag(self, flags: NDArray[np.bool_]) -> Any:
        if self._packed.ndim == 1:
            return bool(flags)
        return torch.from_numpy(flags) if self._tensor else flags

    def _status(self) -> NDArray[np.float64]:
        status: NDArray[np.float64] = self._packed[..., 3 * len(self.names) + _STATUS]
        return status

    @property
    def gram(self) -> Any:
        """[.., m, m] the Gram matrix."""
        return self._array(self._gram)

    @property
    def weights(self) -> Any:
        """[m] the weights."""
        return self._array(self._weights)

    p = _part(0, "[.., m] the minimiser of f on the simplex that is closest to the weights.")
    p_clipped = _part(1, '[.., m] min(p, weights) under "cagrad-clip", p otherwise.')
    coefficients = _part(2, "[.., m] the coefficients of the gradients in the update.")
    gap = _scalar(_GAP, "f(p) - min_i y_i >= 0.")
    value = _scalar(_VALUE, "f(p).")
    g0_norm = _scalar(_G0_NORM, "||g0|| = sqrt(w'Mw).")
    gp_norm = _scalar(_GP_NORM, "||G p_clipped||.")
    update_norm = _scalar(_UPDATE_NORM, "Norm of the update, from the Gram.")

    @property
    def clip_active(self) -> Any:
        """Whether clipping changed the coefficients; None for a rule without a certificate."""
        flags = self._packed[..., 3 * len(self.names) + _CLIP_ACTIVE]
        return None if np.isnan(flags).any() else self._flag(flags != 0.0)

    @property
    def finite(self) -> Any:
        """Whether the Gram was finite."""
        return self._flag(self._status() != _NON_FINITE)

    @property
    def converged(self) -> Any:
        """Whether the solver finished below its cap on steps."""
        return self._flag(self._status() == 0.0)

    @property
    def status(self) -> Any:
        """What became of the problem, in a word; [n] of them for a batch."""
        words = np.array(_STATUSES)[self._status().astype(int)]
        return str(words) if words.ndim == 0 else words

    @property
    def cosines(self) -> Any:
        """[.., m, m] cosines between the gradients; 0 where a gradient is zero."""
        norms = np.sqrt(np.maximum(np.diagonal(self._gram, axis1=-2, axis2=-1), 0.0))
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms != 0.0)
        with np.errstate(invalid="ignore"):  # a Gram that is not finite gives NaN
            cosines = self._gram * inverse[..., :, None] * inverse[..., None, :]
        return self._array(np.clip(cosines, -1.0, 1.0))

    def among(self, names: tuple[str, ...]) -> "DualSolution":
        """The same solution of one problem where there are more objectives, all of weight 0."""
        m, k, places = len(names), len(self.names), [names.index(name) for name in self.names]
        gram, packed = np.zeros((m, m)), np.zeros(3 * m + _C.SCALARS)
        gram[np.ix_(places, places)] = self._gram
        packed[: 3 * m].reshape(3, m)[:, places] = self._packed[: 3 * k].reshape(3, k)
        packed[3 * m :] = self._packed[3 * k :]
        weights = np.zeros(m)
        weights[places] = self._weights
        return DualSolution(
            names, weights, self.c, self.rule, gram, packed, self._tensor, self.state
        )

    def __repr__(self) -> str:
        """One line a part for one problem, one line in all for a batch."""
        head, clip_active = f"DualSolution(rule={self.rule!r}, c={self.c:g}", self.clip_active
        certified = clip_active is not None
        if self._packed.ndim == 2:
            clipped = f", clip_active in {np.count_nonzero(clip_active)}" if certified else ""
            return f"{head}, n={len(self._packed)}, m={len(self.names)}{clipped})"
        if not self.finite:
            return f"{head}, finite=False)"
        found = f", gap={self.gap:.1e}, clip_active={clip_active}" if certified else ""
        lines = [f"{head}{found},"]
        for name in ("weights", *(("p", "p_clipped") if certified else ()), "coefficients"):
            values = zip(self.names, getattr(self, name).tolist(), strict=True)
            lines.append(f"  {name}={{{', '.join(f'{n}: {v:.6g}' for n, v in values)}}},")
        norms = f"g0_norm={self.g0_norm:.6g}, "
        norms += f"gp_norm={self.gp_norm:.6g}, " if certified else ""
        return "\n".join([*lines, f"  {norms}update_norm={self.update_norm:.6g})"])


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
        rule: "cagrad-clip" (RACO), "cagrad", "linear" (coefficients = weights), "mgda"
            (coefficients = argmin over the simplex of ||Gp||), another name of docs/rules.md,
            {"name": name, option: value}, or a `raco_fast.Rule`.
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
    packed = _C.solve(matrix, array, c, (certified or Linear).number)
    if packed.ndim == 1:
        _raise_for_status(matrix, packed[3 * m :])
    if certified is not None:
        if state:
            checked_state(certified, m, state)  # raises: these rules have none
        return DualSolution(names, array, c, certified.name, matrix, packed, tensor)
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
        rows[lost, 3 * m + _STATUS] = _NON_FINITE
    rows[:, : 2 * m] = np.nan
    rows[:, [3 * m + k for k in (_GAP, _VALUE, _GP_NORM, _CLIP_ACTIVE)]] = np.nan
    fine = rows[:, 3 * m + _STATUS] == 0.0
    M = (M[fine] + M[fine].swapaxes(1, 2)) * 0.5
    np.einsum("nii->ni", M)[:] = np.maximum(np.einsum("nii->ni", M), 0.0)
    problem = Problem(M, weights, c, None if values is None else values[fine])
    coefficients, norms, after = apply(rule, problem, before)
    rows[fine, 2 * m : 3 * m], rows[fine, 3 * m + _UPDATE_NORM] = coefficients, norms
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
    status, i, j = (int(scalars[k]) for k in (_STATUS, _ROW, _COLUMN))
    if not _NEGATIVE_DIAGONAL <= status <= _NOT_GRAM:
        return
    a = f"gram[{i}, {j}] = {M[i, j]:g}"
    if status == _NEGATIVE_DIAGONAL:
        rule, cure = "have a non-negative diagonal", "a squared norm cannot be negative"
    elif status == _ASYMMETRIC:
        a += f" and gram[{j}, {i}] = {M[j, i]:g}"
        rule, cure = "be symmetric", "pass G @ G.T, or the average with its transpose"
    else:
        a += f" with diagonal entries {M[i, i]:g} and {M[j, j]:g}"
        rule, cure = "satisfy |M_ij| <= sqrt(M_ii M_jj)", "use the same gradients for all"
    raise ValueError(f"`gram` must {rule}, got {a}; {cure}")
