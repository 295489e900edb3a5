"""The part of a step that a host decides otherwise, kept on the device: solve, clip, skip, count.

With at most 3 objectives the dual problem is solved by a kernel (`kernels/solve_dual.py`), and what
it finds stays where the update kernel reads it. So a step can be captured in a CUDA graph, and
nothing waits until somebody looks at `solution` or `skipped`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from raco_fast.kernels import solve_dual as kernel
from raco_fast.kernels.tables import upload
from raco_fast.solver.dual import DualSolution


class DeviceStep:
    """Buffers of one optimizer: a graph that captured a step writes to them at every replay.

    Args:
        m: the number of objectives, at most 3.
        device: of the gradients.
    """

    def __init__(self, m: int, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.outputs = kernel.Outputs(
            packed=empty(3 * m + kernel.SCALARS, dtype=torch.float64),
            used=empty(m, m, dtype=torch.float64),
            step=empty(m + 2, dtype=torch.float32),
            skipped=torch.zeros(1, dtype=torch.int64, device=device),
        )
        self._one = torch.ones(1, device=device)
        self._zero = torch.zeros(1, device=device)
        self._asked: tuple[dict[str, float], float, str] | None = None

    def solve(
        self,
        gram: Tensor,
        weights: Mapping[str, float],
        c: float,
        rule: str,
        max_grad_norm: float | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Find the coefficients of one step.

        Args:
            gram: [m, m] float64 on the device, of gradients times `grad_scale`.
            weights, c, rule, max_grad_norm: as in `ClippedCAGradAdamW`, checked.
            grad_scale, found_inf: GradScaler's, one float32 each on the device; None for 1 and 0.
        """
        limit = math.inf if max_grad_norm is None else max_grad_norm
        problem = np.array([*weights.values(), c, limit])
        self.grad_scale = self._one if grad_scale is None else grad_scale
        self._asked = (dict(weights), c, rule)
        kernel.solve_dual(
            gram,
            upload(problem, gram.device),
            self.grad_scale,
            self._zero if found_inf is None else found_inf,
            self.outputs,
            rule,
        )

    @property
    def alpha(self) -> Tensor:
        """[m] float32, NaN where the step is skipped."""
        return self.outputs.step[:-2]

    @property
    def clip(self) -> Tensor:
        """[1] float32, the factor that keeps ‖G0‖ within max_grad_norm."""
        return self.outputs.step[-2:-1]

    @property
    def runs(self) -> Tensor:
        """Float32 scalar: 1, or 0 where the step is skipped."""
        return self.outputs.step[-1]

    @property
    def never(self) -> Tensor:
        """[1] float32, 0: found_inf is in alpha already."""
        return self._zero

    def solution(self) -> DualSolution:
        """The solution of the last step, also of the last replay; waits for the device."""
        assert self._asked is not None, "a solution was asked for before the first step"
        weights, c, rule = self._asked
        values = np.array(list(weights.values()))
        packed, used = self.outputs.packed.cpu().numpy(), self.outputs.used.cpu().numpy()
        return DualSolution(tuple(weights), values, c, rule, used, packed, True)

    def skipped(self) -> int:
        """How many steps were skipped; waits for the device."""
        return int(self.outputs.skipped)
