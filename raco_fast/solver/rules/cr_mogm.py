"""CR-MOGM: the coefficients of another rule, averaged over the steps."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule, State, check_option
from raco_fast.solver.rules.conflict_averse import CAGradClip

_PAPERS = CAGradClip()
_OF = "of."
"""Begins the names of the other rule's state in this one's."""


@dataclass(frozen=True)
class CRMOGM(Rule):
    """a_t = alpha a_(t-1) + (1 - alpha) â_t, â_t being the coefficients of the rule `of`.

    a_1 = â_1. The average follows what does not change from step to step, and has less of the noise
    that â_t and the gradients of the same step share; it takes nothing of the bias away that a
    noisy Gram matrix gives â_t. The other rule's certificate is not one of the average, and
    ‖Σ (a_i - w_i) g_i‖ = c ‖g0‖ no longer holds.

    The paper lets alpha grow towards 1 as the learning rate falls (1 - lr / lr_0 is its example);
    here it stays.

    Args:
        of: the rule whose coefficients are averaged; by name in configs.
        alpha: in [0, 1), the share of the step before; 0 changes nothing.
    Source: Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
        Beyond, NeurIPS 2022, as TorchJD's CRMOGMWeighting has it; the paper itself was not read.
    """

    scale_invariant: ClassVar[bool] = True
    of: Rule = _PAPERS
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.of, Rule):
            raise TypeError(
                f"`of` of the rule cr-mogm must be a raco_fast.Rule, got {self.of!r}; "
                f"by name write rule={{'name': 'cr-mogm', 'of': {self.of!r}}}"
            )
        check_option("alpha", self.alpha, "cr-mogm", 0.0, 1.0, "[)")
        for name in ("needs_losses", "uses_weights", "scale_invariant"):
            object.__setattr__(self, name, getattr(self.of, name))

    def initial_state(self, m: int) -> State:
        """The number of steps, the last coefficients, and what the other rule remembers."""
        inner = {_OF + name: value for name, value in self.of.initial_state(m).items()}
        return {"steps": np.zeros(()), "coefficients": np.zeros(m), **inner}

    def step(self, problem: Problem, state: State) -> tuple[Array, State]:
        """One problem."""
        inner = {k.removeprefix(_OF): v for k, v in state.items() if k.startswith(_OF)}
        found, after = self.of.step(problem, inner)
        share = self.alpha if state["steps"] > 0.0 else 0.0
        averaged = share * state["coefficients"] + (1.0 - share) * found[0]
        kept = {_OF + name: value for name, value in after.items()}
        return averaged[None], {"steps": state["steps"] + 1.0, "coefficients": averaged, **kept}
