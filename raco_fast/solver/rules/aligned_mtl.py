"""Aligned-MTL: the gradients' principal components, all of the same length."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from raco_fast.solver.rule import Array, Problem, Rule
from raco_fast.solver.spectrum import decomposed, inverse_power


@dataclass(frozen=True)
class AlignedMTL(Rule):
    """√λ V Λ^(-1/2) V' w with M = V Λ V': weights are those of the aligned gradients.

    Components whose eigenvalue is rounding (8 m ε of the largest) are left out. A gradient of zero
    has the coefficient 0, as its direction is unknown; if all are zero, they are the weights.

    Args:
        scale: which λ of those kept: "min" (the paper), "median" (the lower one) or "mean".
    Source: Senushkin et al., Independent component alignment for multi-task learning, CVPR 2023,
    Algorithm 1.
    """

    scale_invariant: ClassVar[bool] = True
    scale: str = "min"

    def __post_init__(self) -> None:
        if self.scale not in ("min", "median", "mean"):
            raise ValueError(
                f"`scale` of the rule aligned-mtl must be min, median or mean, got {self.scale!r}"
            )

    def coefficients(self, problem: Problem) -> Array:
        largest = np.maximum(problem.norms.max(1), np.finfo(float).tiny)[:, None, None]
        H = problem.gram / largest / largest
        values, _, kept = decomposed(H)
        count = kept.sum(1)
        if self.scale == "mean":
            level = values.sum(1) / np.maximum(count, 1)
        else:
            place = problem.m - (count if self.scale == "min" else (count + 2) // 2)
            level = np.take_along_axis(values, np.minimum(place, problem.m - 1)[:, None], 1)[:, 0]
        weights = np.broadcast_to(problem.weights, problem.norms.shape)
        aligned = np.sqrt(level)[:, None] * inverse_power(H, 0.5, weights)
        return np.where(count[:, None] > 0, aligned, weights)
