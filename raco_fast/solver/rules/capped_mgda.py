"""Capped MGDA: the shortest combination in which no objective has too large a share."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.quadratic import minimise
from raco_fast.solver.rule import Array, Problem, Rule, check_option


@dataclass(frozen=True)
class CappedMGDA(Rule):
    """argmin a'Ma over the simplex with a_i <= w_i / α.

    It is the dual of max over ‖d‖ <= 1 of the CVaR at level α of ⟨g_i, d⟩, objective i having the
    probability w_i: α = 1 is the weighted sum, α -> 0 is MGDA. With equal weights a_i <= 1/(α m),
    the paper's. A gradient of zero takes as much as its cap allows. Of several minimisers (the
    update is the same) one is taken.

    Args:
        alpha: in (0, 1].
    Source: arXiv 2605.30452; caps proportional to weights are ours, by the definition of CVaR.
    """

    scale_invariant: ClassVar[bool] = True
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_option("alpha", self.alpha, "capped-mgda", 0.0, 1.0, "(]")

    def coefficients(self, problem: Problem) -> Array:
        found = np.empty(problem.norms.shape)
        zero, caps = np.zeros(problem.m), np.minimum(problem.weights / self.alpha, 1.0)
        for C, norms, into in zip(problem.cosines, problem.norms, found, strict=True):
            largest = norms.max()
            unit = np.where(norms > 0.0, norms, largest if largest > 0.0 else 1.0)
            row = largest / unit if largest > 0.0 else unit
            z = minimise(C, zero, zero, problem.weights * unit, zero, caps * unit, row)
            assert z is not None, "the simplex is bounded"
            into[:] = z / unit
            # The sum is known to rounding of the largest z; its error goes where it weighs least.
            missing = 1.0 - into.sum()
            room = np.minimum(into, caps - into) > abs(missing)
            if room.any():
                into[np.argmin(np.where(room, norms, np.inf))] += missing
        return found
