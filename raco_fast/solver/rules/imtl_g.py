"""IMTL-G: equal projections on all unit gradients."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule
from raco_fast.solver.spectrum import decomposed, inverse_power


@dataclass(frozen=True)
class IMTLG(Rule):
    """v / Σ v with v = M⁺ √diag(M): the update has the same projection on every g_i / ‖g_i‖.

    Has no weights. That projection is negative where Σ v is, as in the formula of the paper. A
    gradient of zero has the coefficient 0; where Σ v is rounding (opposite gradients) all have.
    Source: Liu et al., Towards impartial multi-task learning, ICLR 2021, Eq. 6; with M⁺ for
    dependent gradients arXiv 2406.16232. ConFIG (arXiv 2408.11104) has the same direction.
    """

    uses_weights: ClassVar[bool] = False
    scale_invariant: ClassVar[bool] = True

    def coefficients(self, problem: Problem) -> Array:
        largest = np.maximum(problem.norms.max(1), np.finfo(float).tiny)[:, None]
        norms = problem.norms / largest
        H = problem.gram / largest[:, :, None] / largest[:, :, None]
        # Where no component is left out, M⁻¹ by cosines, which is as exact where lengths differ.
        whole = decomposed(problem.cosines)[2].all(1, keepdims=True)
        by_cosines = inverse_power(problem.cosines, 1.0, np.ones_like(norms))
        v = np.where(
            whole,
            by_cosines * problem.inverse_norms * largest,
            np.where(norms > 0.0, inverse_power(H, 1.0, norms), 0.0),
        )
        total, terms = v.sum(1, keepdims=True), abs(v).sum(1, keepdims=True)
        known = abs(total) > 1e-12 * terms
        return np.where(known, v / np.where(known, total, 1.0), 0.0)
