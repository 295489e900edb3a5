"""DualProj: the weighted gradient, projected so that it conflicts with none (GEM's step)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.quadratic import nonnegative
from raco_fast.solver.rule import Array, Problem, Rule


@dataclass(frozen=True)
class DualProj(Rule):
    """argmin v'Mv over v >= w: the vector closest to g0 whose products with all g_i are >= 0.

    A gradient of zero conflicts with none and keeps its weight. Of several v (the update is the
    same) one is taken.
    Source: arXiv 1706.08840, Eq. 11; arXiv 2406.16232 gives it this name.
    """

    scale_invariant: ClassVar[bool] = True

    def coefficients(self, problem: Problem) -> Array:
        targets = problem.weights * problem.norms
        return problem.weights + added(problem, targets[:, None, :])[:, 0]


def added(problem: Problem, targets: Array) -> Array:
    """[n, k, m]: argmin over x >= 0 of ‖G(u + x)‖ for k vectors u, given as u_i ‖g_i‖."""
    found = np.empty(targets.shape)
    for C, of_problem, into in zip(problem.cosines, targets, found, strict=True):
        for k, target in enumerate(of_problem):
            x = nonnegative(C, C @ target, abs(C) @ target)
            assert x is not None, "a squared norm has a minimum"
            into[k] = x
    return found * problem.inverse_norms[:, None, :]
