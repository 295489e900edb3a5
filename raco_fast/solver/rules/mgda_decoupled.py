"""MGDA-Decoupled: MGDA's coefficients of the logarithms of the losses, on the losses' gradients."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule, scaled
from raco_fast.solver.rules.conflict_averse import shortest


@dataclass(frozen=True)
class MGDADecoupled(Rule):
    """λ = argmin over the simplex of ‖Σ λ_i g_i / L_i‖; the update is Σ λ_i g_i.

    Has no weights. Where several λ are minimisers, as with dependent gradients, the update depends
    on which: it is the most even one, as far as rounding lets that be known. A gradient of zero
    takes all of λ, as in MGDA: its objective is stationary, and the update is zero.
    Source: MGDA-Decoupled, as a secondary summary gives it; the paper itself was not read.
    """

    needs_losses: ClassVar[bool] = True
    uses_weights: ClassVar[bool] = False
    scale_invariant: ClassVar[bool] = True

    def coefficients(self, problem: Problem) -> Array:
        losses = problem.losses
        assert losses is not None, "the rule needs losses"
        # Of an objective without a label in the step the loss is 0 as well; zero is zero divided
        # by whatever.
        losses = np.where(problem.norms > 0.0, losses, 1.0)
        if losses.min() <= 0.0:
            raise ValueError(
                f"`losses` must be positive for the rule mgda-decoupled, which divides by them, "
                f"got {losses.tolist()}; add a constant to the loss, or choose another rule"
            )
        return shortest(scaled(problem.gram, losses.min(1, keepdims=True) / losses))[0]
