"""SDMGrad: the shortest combination near the preferred one, by a few steps from where one was."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule, State, check_option
from raco_fast.solver.simplex import projected


@dataclass(frozen=True)
class SDMGrad(Rule):
    """(u + λ w) / (1 + λ), u after some projected steps down ½ ‖Σ (u_i + λ w_i) g_i‖².

    v ← momentum v + H (u + λ w),  u ← closest point of the simplex to u - lr v, `iterations`
    times, from v = 0 and the u of the step before, which begins evenly. H is the Gram matrix over
    the squared mean norm, so that lr has no unit. The paper has for H products of two independent
    batches; gram="unbiased" is the average of those over all ways of halving this one (and over
    steps, without its negative eigenvalues), gram="batch" the matrix whose bias they avoid. As with
    MGDA a gradient of zero attracts u.

    Args:
        lam: λ in [0, inf), the pull towards w: 0 is MGDA by gradient steps, a large one the
            weighted sum.
        lr: positive. Beyond 2 over the largest eigenvalue of H, as the published 10 is, u leaps
            from face to face and rounding may decide where it ends; 0.2 converges for m <= 10.
        momentum: in [0, 1).
        iterations: a whole number, at least 1.
    Source: Xiao, Ban and Ji, Direction-oriented Multi-objective Learning, NeurIPS 2023
        (arXiv 2305.18409), as TorchJD's SDMGradWeighting has it, with its numbers; the paper itself
        was not read.
    """

    scale_invariant: ClassVar[bool] = True
    lam: float = 0.3
    lr: float = 10.0
    momentum: float = 0.5
    iterations: int = 20

    def __post_init__(self) -> None:
        check_option("lam", self.lam, "sdmgrad", 0.0, np.inf, "[)")
        check_option("lr", self.lr, "sdmgrad", 0.0, np.inf, "()")
        check_option("momentum", self.momentum, "sdmgrad", 0.0, 1.0, "[)")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int):
            raise TypeError(
                f"`iterations` of the rule sdmgrad must be a whole number, got {self.iterations!r}"
            )
        check_option("iterations", self.iterations, "sdmgrad", 1, np.inf, "[)")

    def initial_state(self, m: int) -> State:
        """u."""
        return {"u": np.full(m, 1.0 / m)}

    def step(self, problem: Problem, state: State) -> tuple[Array, State]:
        """One problem; u is projected first, as that of some of the objectives may sum to less."""
        mean = problem.norms[0].mean()
        H = problem.gram[0] / mean / mean if mean > 0.0 else problem.gram[0]
        u, v, pull = projected(state["u"]), np.zeros(problem.m), self.lam * problem.weights
        for _ in range(self.iterations):
            v = self.momentum * v + H @ (u + pull)
            u = projected(u - self.lr * v)
        return ((u + pull) / (1.0 + self.lam))[None], {"u": u}
