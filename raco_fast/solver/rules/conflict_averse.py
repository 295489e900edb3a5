"""The four rules of the exact solver in C++ (csrc/solver/dual.hpp); `solve_dual` states them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast import _C
from raco_fast.solver.rule import Array, Problem, Rule


class DualRule(Rule):
    """A rule whose optimum has a certificate: p, its duality gap and what clipping did."""

    scale_invariant: ClassVar[bool] = True
    name: ClassVar[str]
    number: ClassVar[int]
    """Of enum Rule in csrc/solver/dual.hpp."""

    def coefficients(self, problem: Problem) -> Array:
        """[n, m], as `solve_dual` finds them."""
        m = problem.m
        packed: Array = _C.solve(problem.gram, problem.weights, problem.c, self.number)
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
    """w + (s / ‖Gp̃‖) p̃ with p̃ = min(p, w); RACO, arXiv 2602.02495, Algorithm 1."""

    name, number = "cagrad-clip", 2


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
