"""Chebyshev centre: the unit vector with the largest least cosine."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Index, Problem, Rule, where_present
from raco_fast.solver.rules.conflict_averse import shortest


@dataclass(frozen=True)
class Chebyshev(Rule):
    """d = u / ‖u‖, u = Σ λ_i g_i / ‖g_i‖ the shortest: argmax over ‖d‖ <= 1 of the least ⟨g_i, d⟩ /
    ‖g_i‖.

    The update has length 1, or 0 at a Pareto-stationary point (where u = 0). Has no weights; a
    gradient of zero has no direction and the coefficient 0, the others are solved without it.
    Source: the definition in the abstract of arXiv 2605.09975; its step length was not read.
    """

    uses_weights: ClassVar[bool] = False

    def coefficients(self, problem: Problem) -> Array:
        def solve(rows: Index, places: Index) -> Array:
            lam, length = shortest(problem.cosines[rows][:, places][:, :, places])
            lam = lam / np.where(length > 0.0, length, 1.0)[:, None]
            return lam * problem.inverse_norms[rows][:, places]

        return where_present(problem.norms > 0.0, solve)
