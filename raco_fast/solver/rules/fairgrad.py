"""FairGrad: α-fair shares of the update."""

from dataclasses import dataclass

from raco_fast.solver.fairness import fair_coefficients
from raco_fast.solver.rule import Array, Problem, Rule, check_option


@dataclass(frozen=True)
class FairGrad(Rule):
    """Ma = (a / (m w))^(-1/α) with a > 0: the update maximises Σ w_i ⟨g_i, d⟩^(1-α) / (1-α).

    α = 1 is Nash-MTL; α -> 0 tends to the weighted sum, α -> ∞ to the largest least product. What
    a gradient of zero and a stationary point mean: `fairness.fair_coefficients`.

    Args:
        alpha: in [0.1, 20]; beyond, float64 ends.
    Source: arXiv 2402.15638, Eq. 4.
    """

    alpha: float = 2.0

    def __post_init__(self) -> None:
        check_option("alpha", self.alpha, "fairgrad", 0.1, 20.0)

    def coefficients(self, problem: Problem) -> Array:
        return fair_coefficients(problem, float(self.alpha))
