"""GradVac: bend each gradient until its cosine with the others is what it has been on average."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule, State, check_option
from raco_fast.solver.rules.pcgrad import orders

_NOISE = 4.0 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class GradVac(Rule):
    """Σ_i w_i g_i', where g_i' meets the g_j in random order and, if cos(g_i', g_j) = φ < φ̂_ij,

        g_i' += ‖g_i'‖ (φ̂ √(1 - φ²) - φ √(1 - φ̂²)) / (‖g_j‖ √(1 - φ̂²)) g_j,

    and φ̂_ij, which begins at 0, moves to φ by the share beta. As for PCGrad the weights are those
    of the losses. With a gradient of zero, or a g_i' that is rounding, there is no cosine: nothing
    is added and φ̂ stays.

    Args:
        beta: in (0, 1], share of the new cosine in φ̂.
        seed: of the orders, together with the number of steps.
    Source: arXiv 2010.05874, Algorithm 1.
    """

    scale_invariant: ClassVar[bool] = True
    beta: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_option("beta", self.beta, "gradvac", 0.0, 1.0, "(]")

    def initial_state(self, m: int) -> State:
        """The number of steps and the cosines aimed at."""
        return {"steps": np.zeros(()), "cosines": np.zeros((m, m))}

    def step(self, problem: Problem, state: State) -> tuple[Array, State]:
        """One problem; the coefficients of g_i' are a row of z, in units of ‖g_i‖ / ‖g_j‖."""
        (C,), (inverse,), (norms,) = problem.cosines, problem.inverse_norms, problem.norms
        z, rows, target = np.eye(problem.m), np.arange(problem.m), state["cosines"].copy()
        for j in orders(self.seed, int(state["steps"]), problem.m).T:
            square = np.einsum("ik,kl,il->i", z, C, z)
            known = (square > _NOISE * abs(z).sum(1) ** 2) & (norms[j] > 0.0) & (j != rows)
            length = np.sqrt(np.where(known, square, 1.0))
            phi = np.clip(np.einsum("ik,ik->i", z, C[j]) / length, -1.0, 1.0)
            aim = target[rows, j]
            sine, aimed = np.sqrt(1.0 - phi**2), np.sqrt(1.0 - aim**2)
            low = known & (phi < aim) & (aimed > 0.0)
            z[rows, j] += np.where(
                low, length * (aim * sine / np.where(low, aimed, 1.0) - phi), 0.0
            )
            target[rows, j] = np.where(known, aim + self.beta * (phi - aim), aim)
        coefficients = (problem.weights * norms) @ z * inverse
        coefficients = np.where(norms > 0.0, coefficients, problem.weights)
        return coefficients[None], {"steps": state["steps"] + 1.0, "cosines": target}
