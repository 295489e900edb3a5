"""What a combination rule is: Gram matrix and weights in, one coefficient per objective out.

A rule of one's own is a frozen dataclass that derives from `Rule`; its fields are its options.
docs/rules.md has an example, and the table of the rules that are here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Index: TypeAlias = NDArray[np.intp]
Mask: TypeAlias = NDArray[np.bool_]
State: TypeAlias = dict[str, NDArray[np.float64]]
"""Name -> array of shape (), [m] or [m, m]: every axis is one of objectives."""


@dataclass(frozen=True)
class Problem:
    """The Gram matrices of n steps, checked.

    Args:
        gram: [n, m, m] float64, M_ij = <g_i, g_j>: finite, symmetric, with a non-negative diagonal.
        weights: [m] float64, the user's: non-negative, sum 1.
        c: the radius of CAGrad, for rules that have one.
        losses: [n, m] float64, where the rule `needs_losses`; else None. Those that a GradScaler
            scaled have its factor.
    """

    gram: Array
    weights: Array
    c: float
    losses: Array | None = None

    @property
    def m(self) -> int:
        """The number of objectives."""
        return len(self.weights)

    @cached_property
    def norms(self) -> Array:
        """[n, m] norms of the gradients."""
        return np.sqrt(np.diagonal(self.gram, axis1=1, axis2=2))

    @cached_property
    def inverse_norms(self) -> Array:
        """[n, m] 1 / norm, and 0 for a gradient of zero."""
        return np.divide(1.0, self.norms, out=np.zeros_like(self.norms), where=self.norms > 0.0)

    @cached_property
    def cosines(self) -> Array:
        """[n, m, m] cosines between the gradients; rows of zeros for gradients of zero."""
        return scaled(self.gram, self.inverse_norms)


class Rule:
    """How m gradients become one: the base class of all rules.

    Derive a frozen dataclass, so that its options are its fields (numbers, strings, booleans, or
    rules where the default is one: they travel in checkpoints as JSON), and define `coefficients`,
    or `step` and `initial_state` if the rule remembers something. A rule itself holds no state: the
    optimizer keeps it.
    """

    needs_losses: ClassVar[bool] = False
    """Whether `Problem.losses` must be there."""
    uses_weights: ClassVar[bool] = True
    """Whether the coefficients depend on the user's weights."""
    scale_invariant: ClassVar[bool] = False
    """Whether they stay the same when all gradients and losses are multiplied by one number, which
    may differ from step to step: only then can a GradScaler's factor be divided out afterwards."""

    def coefficients(self, problem: Problem) -> Array:
        """[n, m] finite float64: the update of step k is Σ_i coefficients[k, i] g_i."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `coefficients`, or `step` and `initial_state`"
        )

    def initial_state(self, m: int) -> State:
        """What a rule with a memory begins with for m objectives; {} for one without."""
        return {}

    def step(self, problem: Problem, state: State) -> tuple[Array, State]:
        """The coefficients and the next state; of a rule with a memory, n is 1.

        `state` must not be written to: a step that is skipped goes on from it.
        """
        return self.coefficients(problem), state


def scaled(gram: Array, factors: Array) -> Array:
    """[n, m, m]: the Gram matrices of factors_i g_i; one factor at a time, against overflow."""
    return gram * factors[:, :, None] * factors[:, None, :]


def size(gram: Array, x: Array) -> Array:
    """[n] norms ‖Σ x_i g_i‖ for x [n, m], and 0 where that is rounding of its own terms."""
    square = np.einsum("ni,nij,nj->n", x, gram, x)
    terms = np.einsum("ni,ni->n", abs(x), np.sqrt(np.einsum("nii->ni", gram)))
    return np.sqrt(np.where(square > 4.0 * np.finfo(float).eps * terms**2, square, 0.0))


def where_present(present: Mask, solve: Callable[[Index, Index], Array]) -> Array:
    """[n, m] coefficients of the objectives that take part in each problem, 0 of the others.

    Args:
        present: [n, m] booleans.
        solve: (rows, places) -> coefficients of `places`, in the problems `rows` that share them.
    """
    coefficients = np.zeros(present.shape)
    same = bool((present == present[:1]).all())
    for pattern in present[:1] if same else np.unique(present, axis=0):
        rows, places = np.flatnonzero((present == pattern).all(1)), np.flatnonzero(pattern)
        if len(places):
            coefficients[np.ix_(rows, places)] = solve(rows, places)
    return coefficients


def check_option(
    name: str, value: float, rule: str, low: float, high: float, brackets: str = "[]"
) -> None:
    """Raise unless an option is a number of an interval, whose brackets say what of it is open."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` of the rule {rule} must be a number, got {value!r}")
    above = low <= value if brackets[0] == "[" else low < value
    below = value <= high if brackets[1] == "]" else value < high
    if not (above and below):
        interval = f"{brackets[0]}{low:g}, {high:g}{brackets[1]}"
        raise ValueError(f"`{name}` of the rule {rule} must be in {interval}, got {value}")
