"""MoDo: one projected gradient step towards the shortest combination, at every step."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule, State, check_option
from raco_fast.solver.simplex import projected


@dataclass(frozen=True)
class MoDo(Rule):
    """u ← closest point of the simplex to u - γ (M u + ρ u), which begins evenly; has no weights.

    M is of two independent batches in the paper, a double sample that does not bias the step:
    gram="unbiased" stands for that as with `sdmgrad`, gram="batch" is what the paper warns of. γ
    has the unit of 1/‖g‖², and u moves by γ times products of gradients: choose it for their
    norms. A gradient of zero attracts u.

    Args:
        gamma: γ, positive.
        rho: ρ in [0, inf), the pull towards equal coefficients, in the unit of ‖g‖².
    Source: Chen, Fernando, Ying and Chen, Three-Way Trade-Off in Multi-Objective Learning, JMLR 25
        (2024), as TorchJD's MoDoWeighting has it, with its numbers; the paper itself was not read.
    """

    uses_weights: ClassVar[bool] = False
    gamma: float = 0.1
    rho: float = 0.1

    def __post_init__(self) -> None:
        check_option("gamma", self.gamma, "modo", 0.0, np.inf, "()")
        check_option("rho", self.rho, "modo", 0.0, np.inf, "[)")

    def initial_state(self, m: int) -> State:
        """u."""
        return {"u": np.full(m, 1.0 / m)}

    def step(self, problem: Problem, state: State) -> tuple[Array, State]:
        """One problem; u is projected first, as that of some of the objectives may sum to less."""
        u = projected(state["u"])
        after = projected(u - self.gamma * (problem.gram[0] @ u + self.rho * u))
        return after[None], {"u": after}
