"""PCD: follow the first objective, as far as the others make progress too."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.quadratic import nonnegative
from raco_fast.solver.rule import Array, Problem, Rule, State, check_option, scaled, size


@dataclass(frozen=True)
class PCD(Rule):
    """argmin ‖d - g̃_1‖ with ⟨g̃_j, d⟩ >= τ ‖g̃_j‖² for j > 1, stretched to the length of g_1.

    g̃_i = g_i / √v_i, v_i the bias-corrected moving average of ‖g_i‖². The first objective (of
    those that have a loss) is the primary one; has no weights. Where no d fulfils all conditions
    they are dropped and the update is g_1; where g_1 = 0 it is zero, and a secondary gradient of
    zero asks for nothing. The paper's ε below the root is 0, so that a scale which stays the
    same does not matter.

    Args:
        tau: in [0, 1], the progress of each secondary objective.
        beta: in [0, 1), decay of the moving average.
    Source: arXiv 2606.29521, which has a working implementation in TorchJD.
    """

    uses_weights: ClassVar[bool] = False
    tau: float = 0.02
    beta: float = 0.999

    def __post_init__(self) -> None:
        check_option("tau", self.tau, "pcd", 0.0, 1.0)
        check_option("beta", self.beta, "pcd", 0.0, 1.0, "[)")

    def initial_state(self, m: int) -> State:
        """The number of steps and the moving average of the squared norms."""
        return {"steps": np.zeros(()), "squares": np.zeros(m)}

    def step(self, problem: Problem, state: State) -> tuple[Array, State]:
        """One problem."""
        steps = state["steps"] + 1.0
        squares = self.beta * state["squares"] + (1.0 - self.beta) * problem.norms[0] ** 2
        average = squares / (1.0 - self.beta**steps)
        scale = np.divide(1.0, np.sqrt(average), out=np.zeros(problem.m), where=average > 0.0)
        after = {"steps": steps, "squares": squares}
        H = scaled(problem.gram, scale[None])[0]
        lengths = np.sqrt(np.diag(H))
        mu = self._multipliers(problem.cosines[0], lengths)
        d = np.concatenate([[1.0], mu])
        length = size(H[None], d[None])[0]
        if length == 0.0 or lengths[0] == 0.0:
            return np.zeros((1, problem.m)), after
        return (d * scale * problem.norms[0, 0] / length)[None], after

    def _multipliers(self, C: Array, lengths: Array) -> Array:
        """[m - 1] of the conditions; z_j = mu_j ‖g̃_j‖ leaves a matrix of cosines."""
        rest = lengths[1:]
        along, asked = C[1:, 0] * lengths[0], self.tau * rest
        if not len(rest):
            return rest
        z = nonnegative(C[1:, 1:], along - asked, abs(along) + asked)
        if z is None:
            return np.zeros(len(rest))
        return np.divide(z, rest, out=np.zeros(len(rest)), where=rest > 0.0)
