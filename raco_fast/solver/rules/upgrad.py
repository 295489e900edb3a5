"""UPGrad: every objective's gradient, projected so that it conflicts with none, then weighted."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule
from raco_fast.solver.rules.dualproj import added


@dataclass(frozen=True)
class UPGrad(Rule):
    """Σ_i argmin v'Mv over v >= w_i e_i: m projections, where DualProj takes one of their sum.

    A gradient of zero conflicts with none and keeps its weight.
    Source: arXiv 2406.16232, Section 4.
    """

    scale_invariant: ClassVar[bool] = True

    def coefficients(self, problem: Problem) -> Array:
        targets = np.eye(problem.m) * (problem.weights * problem.norms)[:, None, :]
        total: Array = added(problem, targets).sum(1)
        return problem.weights + total
