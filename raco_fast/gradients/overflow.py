"""p.grad where the common direction is not finite: NaN to look at, nothing to step along.

GradScaler has to find the overflow in p.grad, or it neither skips the step nor lowers the scale;
without GradScaler an optimizer would carry the NaN into the parameters. So every gradient is
NaN, and those that are still there go before any torch optimizer's step and before the next
backward pass of an objective.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from raco_fast.distributed.dtensor import local

_left: dict[int, tuple[weakref.ref[Tensor], int]] = {}
"""id of a parameter -> (the parameter, id of the gradient it was left)."""
_hooks: list[Any] = []


def leave_overflow(params: Iterable[Tensor]) -> None:
    """Give parameters a p.grad of NaN, which is None again when their optimizer steps."""
    for p in params:
        p.grad = torch.full_like(p, torch.nan, requires_grad=False)
        key = id(p)
        alive = weakref.ref(p, lambda _, key=key: _left.pop(key, None))  # type: ignore[misc]
        _left[key] = alive, id(p.grad)
    if _left and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_clear_before_step))


def clear_overflow(params: Iterable[Tensor]) -> None:
    """Make None of what `leave_overflow` left to these parameters."""
    if not _left:
        return
    for p in params:
        _, left = _left.pop(id(p), (None, None))
        # Zeroed in place, the same tensor may hold a good gradient by now.
        if p.grad is not None and id(p.grad) == left and bool(local(p.grad).isnan().all()):
            p.grad = None


def _clear_before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    clear_overflow(p for group in optimizer.param_groups for p in group["params"])
