"""PCGrad: project each gradient off those it conflicts with, in random order."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from raco_fast.solver.rule import Array, Problem, Rule, State


@dataclass(frozen=True)
class PCGrad(Rule):
    """Σ_i w_i g_i', where g_i' = g_i less its projections on each g_j with ⟨g_i', g_j⟩ < 0.

    The method applied to the losses w_i L_i: with equal weights the paper's sum divided by m. A
    gradient of zero conflicts with none and adds nothing.

    Args:
        seed: of the order of the j, together with the number of steps, which is the state.
    Source: arXiv 2001.06782, Algorithm 1.
    """

    scale_invariant: ClassVar[bool] = True
    seed: int = 0

    def initial_state(self, m: int) -> State:
        """The number of steps taken."""
        return {"steps": np.zeros(())}

    def step(self, problem: Problem, state: State) -> tuple[Array, State]:
        """One problem; the coefficients of g_i' are a row of z, in units of ‖g_i‖ / ‖g_j‖."""
        (C,), (inverse,), (norms,) = problem.cosines, problem.inverse_norms, problem.norms
        z, rows = np.eye(problem.m), np.arange(problem.m)
        for j in orders(self.seed, int(state["steps"]), problem.m).T:
            product = np.einsum("ik,ik->i", z, C[j])
            z[rows, j] -= np.where((j != rows) & (product < 0.0), product, 0.0)
        coefficients = (problem.weights * norms) @ z * inverse
        # A gradient of zero has no unit; its coefficient is what the user gave it.
        coefficients = np.where(norms > 0.0, coefficients, problem.weights)
        return coefficients[None], {"steps": state["steps"] + 1.0}


def orders(seed: int, step: int, m: int) -> NDArray[np.intp]:
    """[m, m]: row i is the order in which g_i meets the others, the same on every machine."""
    # The counter goes up by 1 with every draw, so steps beside one another would share draws.
    generator = np.random.Philox(key=seed % 2**64, counter=step << 64)
    numbers = generator.random_raw(m * m)
    return np.argsort(numbers.reshape(m, m), axis=1, kind="stable")
