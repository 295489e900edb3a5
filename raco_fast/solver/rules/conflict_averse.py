"""The four rules of the exact solver in C++ (csrc/solver/dual.hpp); `solve_dual` states them."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast import _C
from raco_fast.solver.rule import Array, Problem, Rule, check_option


class DualRule(Rule):
    """A rule whose optimum has a certificate: p, its duality gap and what clipping did."""

    scale_invariant: ClassVar[bool] = True
    name: ClassVar[str]
    number: ClassVar[int]
    """Of enum Rule in csrc/solver/dual.hpp."""

    @property
    def asked(self) -> tuple[int, float]:
        """The number and the option that `_C.solve` takes, the latter 1.0 for rules without one."""
        return self.number, 1.0

    def coefficients(self, problem: Problem) -> Array:
        """[n, m], as `solve_dual` finds them."""
        m = problem.m
        packed: Array = _C.solve(problem.gram, problem.weights, problem.c, *self.asked)
        return packed[:, 2 * m : 3 * m]


@dataclass(frozen=True)
class Linear(DualRule):
    """Coefficients = weights."""

    name, number = "linear", 0


@dataclass(frozen=True)
class CAGrad(DualRule):
    """w + (s / ‖Gp‖) p; arXiv 2110.14048, with the user's weights."""

    name, number = "cagrad", 1


@dataclass(frozen=True)
class CAGradClip(DualRule):
    """w + (s / ‖Gp̃‖) p̃ with p̃ = min(p, w); RACO, arXiv 2602.02495, Algorithm 1.

    Other clips than the paper's "after" are ours, without published evidence. All keep
    ‖G0 - g0‖ = c ‖g0‖, the one property of the correction that Theorem 3.1 uses.

    Args:
        clip: "after" the minimum; "inside" it: p minimises the same f where p <= kappa w, and is
            not clipped again; or "smooth": p̃ = (p^-q + w^-q)^(-1/q), at most min(p, w).
        kappa: of "inside", in [1, inf]. 1 leaves p = w (the weighted sum, 1 + c times as long), inf
            is "cagrad".
        q: of "smooth", in [1, inf]. inf is "after", 1 half the harmonic mean.
    """

    name, number = "cagrad-clip", 2
    clip: str = "after"
    kappa: float | None = None
    q: float | None = None

    def __post_init__(self) -> None:
        if self.clip not in ("after", *_CLIPS):
            raise ValueError(
                f"`clip` of the rule cagrad-clip must be one of after, {', '.join(_CLIPS)}, got "
                f"{self.clip!r}"
            )
        for clip, (_, option) in _CLIPS.items():
            value = getattr(self, option)
            if clip != self.clip and value is not None:
                raise ValueError(
                    f"`{option}` of the rule cagrad-clip is for clip {clip!r}, got {value!r} with "
                    f"clip {self.clip!r}; leave it out"
                )
            if clip == self.clip and value is None:
                raise ValueError(
                    f"the clip {clip!r} of the rule cagrad-clip needs `{option}`, a number of at "
                    f"least 1: {{'name': 'cagrad-clip', 'clip': {clip!r}, {option!r}: 2.0}}"
                )
            if value is not None:
                check_option(option, value, "cagrad-clip", 1.0, math.inf)

    @property
    def asked(self) -> tuple[int, float]:
        """As of `DualRule`; kInside and kSmooth are rules of their own there."""
        if self.clip == "after":
            return self.number, 1.0
        number, option = _CLIPS[self.clip]
        return number, float(getattr(self, option))


_CLIPS = {"inside": (4, "kappa"), "smooth": (5, "q")}
"""Clip of our own -> its number in enum Rule, and its option."""


@dataclass(frozen=True)
class MGDA(DualRule):
    """argmin over the simplex of ‖Gp‖; arXiv 1810.04650. A gradient of zero makes it zero."""

    name, number, uses_weights = "mgda", 3, False


DUAL_RULES: tuple[type[DualRule], ...] = (Linear, CAGrad, CAGradClip, MGDA)
RULES = tuple(rule.name for rule in DUAL_RULES)


def shortest(gram: Array) -> tuple[Array, Array]:
    """(p [n, m], ‖Gp‖ [n]) of the shortest point of each hull; of several, the most even one.

    A norm that is rounding of its own terms is 0.
    """
    m = gram.shape[-1]
    packed: Array = _C.solve(gram, np.full(m, 1.0 / m), 0.0, MGDA.number)
    return packed[:, :m], packed[:, 3 * m + 1]
