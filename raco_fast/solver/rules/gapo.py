"""GAPO: MGDA on gradients divided by a power of their norms."""

from dataclasses import dataclass
from typing import ClassVar

from raco_fast.solver.rule import Array, Index, Problem, Rule, check_option, scaled, where_present
from raco_fast.solver.rules.conflict_averse import shortest


@dataclass(frozen=True)
class GAPO(Rule):
    """S λ with S = diag(‖g_i‖^-p) and λ = argmin over the simplex of ‖G S λ‖.

    p = 0 is MGDA, p = 1 looks at directions only, p = 2 favours larger gradients. Has no weights.
    A gradient of zero has no direction: its coefficient is 0, the others are solved without it.
    The paper takes the norms of the last layer's gradients; here they are those of all parameters.

    Args:
        p: in [0, 4].
    Source: GAPO, as a secondary summary gives it; the paper itself was not read.
    """

    uses_weights: ClassVar[bool] = False
    p: float = 1.0

    def __post_init__(self) -> None:
        check_option("p", self.p, "gapo", 0.0, 4.0)

    def coefficients(self, problem: Problem) -> Array:
        def solve(rows: Index, places: Index) -> Array:
            norms = problem.norms[rows][:, places]
            powers = (norms / norms.max(1, keepdims=True)) ** (1.0 - self.p)
            lam, _ = shortest(scaled(problem.cosines[rows][:, places][:, :, places], powers))
            return lam * norms**-self.p

        return where_present(problem.norms > 0.0, solve)
