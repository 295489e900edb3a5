"""Nash-MTL: the bargaining solution."""

from dataclasses import dataclass

from raco_fast.solver.fairness import fair_coefficients
from raco_fast.solver.rule import Array, Problem, Rule


@dataclass(frozen=True)
class Nash(Rule):
    """a_i (Ma)_i = m w_i with a > 0: the update maximises Σ w_i log⟨g_i, d⟩ at its length.

    Equal weights are the paper's a_i (Ma)_i = 1, others the asymmetric bargaining solution; the
    update's norm is √m, whatever the gradients' are (the paper clips it: `max_grad_norm`). What a
    gradient of zero and a stationary point mean: `fairness.fair_coefficients`.
    Source: arXiv 2202.01017, Claim 3.1.
    """

    def coefficients(self, problem: Problem) -> Array:
        return fair_coefficients(problem, 1.0)
