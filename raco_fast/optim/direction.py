"""What mode "gram_first" leaves for `step()`: the common direction, found before any gradient."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raco_fast.gradients.norm_clip import refuse_unscaling
from raco_fast.gradients.objective_grad import is_zero


class Direction:
    """The direction of one backward pass, and whether p.grad still is what it left there.

    Args:
        params: the optimizer's.
        finite: whether there is a direction.
        taken: whether every parameter has been updated in the backward pass already.
    """

    def __init__(self, params: Sequence[Tensor], *, finite: bool, taken: bool) -> None:
        self.finite, self.taken = finite, taken
        # The smallest gradient is kept: when gradients are cleared it is cleared too, and an
        # address or id alone could be that of a new gradient.
        held = [p for p in params if p.grad is not None] if finite and not taken else []
        self._p = min(held, key=Tensor.numel, default=None)
        self._grad = None if self._p is None else self._p.grad

    def holds(self, params: Iterable[Tensor]) -> bool:
        """Whether `step()` has to follow it; not if p.grad has been cleared since."""
        if self.finite and not self.taken:
            return self._p is not None and self._p.grad is self._grad
        return all(p.grad is None for p in params)

    def check_cleared(self, params: Sequence[Tensor]) -> None:
        """Raise RuntimeError if gradients would be added to it."""
        there = self.finite and not self.taken and self.holds(params)
        if there and not all(p.grad is None or is_zero(p.grad) for p in params):
            raise RuntimeError(
                "p.grad holds the common direction of backward(mode='gram_first'), to which no "
                "objective's gradient can be added; call step() and zero_grad() first, and "
                "accumulate micro-batches in mode 'one_backward' or 'autograd'"
            )

    def check_unscaled(self, grad_scale: Tensor | None) -> None:
        """Raise RuntimeError if a GradScaler, whose factor this is, comes too late to unscale."""
        if grad_scale is not None:
            refuse_unscaling([self._grad], grad_scale.double().reciprocal())
        if self.taken and grad_scale is not None:
            done = "has updated them already, along" if self.finite else "found an overflow in"
            raise RuntimeError(
                f"a GradScaler was given parameters that backward(step_in_backward=True) updates "
                f"before it can unscale: the backward pass {done} gradients times "
                f"{float(grad_scale):g}; leave out the GradScaler or `step_in_backward`, and load "
                f"the parameters and this optimizer's state again where that matters"
            )


def refuse_scaled(losses: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
    """Raise RuntimeError if a GradScaler has scaled the losses, as far as can be told from them.

    `scale` multiplies every loss by one and the same tensor, by default a power of 2.
    """
    values = losses.values() if isinstance(losses, Mapping) else losses
    factors = [_factor(loss) for loss in values if isinstance(loss, Tensor) and loss.requires_grad]
    if not factors or len({None if f is None else f.data_ptr() for f in factors}) > 1:
        return
    scale = 1.0 if factors[0] is None else float(factors[0])
    if scale > 1.0 and math.frexp(scale)[0] == 0.5:
        raise RuntimeError(
            f"`losses` are multiplied by {scale:g}, as GradScaler does, but "
            f"backward(step_in_backward=True) updates the parameters before anything is unscaled; "
            f"leave out the GradScaler or `step_in_backward` (if there is no GradScaler, multiply "
            f"by a Python number). Nothing has been updated"
        )


def _factor(loss: Tensor) -> Tensor | None:
    """The float32 scalar that a loss was multiplied by; None if there is none.

    Plain numbers, which are float64 scalars in the graph, may have come after it.
    """
    node: Any = loss.grad_fn
    while node is not None and node.name() in ("MulBackward0", "DivBackward0"):
        try:
            factor: Tensor | None = node._saved_other
        except RuntimeError:  # the graph is used up, which the backward pass will say
            return None
        if factor is None or factor.ndim != 0 or factor.requires_grad:
            return None
        if factor.dtype == torch.float32 and node.name() == "MulBackward0":
            return factor
        node = node.next_functions[0][0]
    return None
