"""p.grad on loan: inside `objective(name)` it is the buffer of that one objective.

So an ordinary backward pass adds to the right gradient. Afterwards p.grad holds the stand-in for
all objectives again.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import any_dtensor, is_dtensor, local, placed_like
from raco_fast.gradients.objective_grad import ObjectiveGrad, stand_in_of

Lent: TypeAlias = list[tuple[Tensor, ObjectiveGrad | None, Tensor | None]]
"""(parameter, its stand-in, the buffer that was lent) of each parameter; None: there was none."""


def lend(params: Sequence[Tensor], names: tuple[str, ...], name: str) -> Lent:
    """Put the buffer of objective `name` in every p.grad.

    Raises:
        RuntimeError: p.grad was filled outside of any objective. Nothing has changed then.
    """
    index, lent = names.index(name), []
    for p in params:
        held = stand_in_of(p, names)
        lent.append((p, held, None if held is None else held.buffers[index]))
    for p, held, buffer in lent:
        if held is not None:
            held.escape()
        p.grad = buffer
    return lent


def versions(lent: Lent) -> list[int | None]:
    """Of every DTensor's lent buffer, what changes when it is written; None where there is none."""
    if not any_dtensor(p for p, _, _ in lent):
        return []
    sharded = (buffer for p, _, buffer in lent if is_dtensor(p))
    return [None if buffer is None else local(buffer)._version for buffer in sharded]


def left_in_private(lent: Lent, before: Sequence[int | None]) -> bool:
    """Whether backward passes have left nothing in any DTensor's p.grad: FSDP2 keeps it yet.

    `before`: the `versions` of before.
    """
    params = [p for p, _, _ in lent if is_dtensor(p)] if before else []
    after = (None if p.grad is None else local(p.grad)._version for p in params)
    return bool(before) and all(now == then for now, then in zip(after, before, strict=True))


def take_back(lent: Lent, names: tuple[str, ...], name: str) -> Tensor | None:
    """Note what backward passes left in every p.grad, and put the stand-ins there again.

    Returns:
        A sparse gradient, if there was one; sparse ones are dropped.
    """
    index, sparse = names.index(name), None
    for p, held, buffer in lent:
        grad = p.grad
        if grad is not None and grad.layout != torch.strided:
            sparse, grad = grad, buffer
        if grad is not None and grad is not buffer:
            grad = _with_own_storage(placed_like(grad, p))
        if held is None and grad is not None:
            held = ObjectiveGrad(p, names)
        if held is not None:
            held.buffers[index] = grad
            held.escape()
        p.grad = held if held is not None and held.present else None
    return sparse


def _with_own_storage(grad: Tensor) -> Tensor:
    """A gradient that is a view of a larger buffer (DDP's buckets) is overwritten by the next
    objective's backward pass, so it is copied out.
    """
    if type(grad) is not Tensor or grad.requires_grad:
        return grad
    nbytes = grad.numel() * grad.element_size()
    return grad if grad.untyped_storage().nbytes() == nbytes else grad.clone()
