"""The Gram matrix of what m backward passes add, where a whole micro-batch counts as one sample."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.gradients.objective_grad import ObjectiveGrad, stand_in_of, touched


def gram_of_passes(
    params: Sequence[Tensor], names: tuple[str, ...], run: Callable[[], None]
) -> Tensor:
    """Run passes that add to p.grad; the Gram matrix of what they have added, [m, m] float64, CPU.

    Their gradients are formed beside those of before, and then added to them: a second set of
    buffers exists meanwhile.
    """
    before = [stand_in_of(p, names) for p in params]
    for p in params:
        p.grad = None
    try:
        run()
        own = touched(params, names)
        assert own is not None, "a pass leaves stand-ins"
        M = ops.gram(own.grads)
    finally:
        for p, held in zip(params, before, strict=True):
            if held is not None:
                _add_to(held, p)
    return M


@torch.no_grad()
def _add_to(held: ObjectiveGrad, p: Tensor) -> None:
    """p.grad = held + p.grad, in the memory of `held`."""
    added, p.grad = p.grad, held
    if not isinstance(added, ObjectiveGrad):
        return
    held.products, held.unreduced = None, added.unreduced
    for i, (buffer, g) in enumerate(zip(held.buffers, added.buffers, strict=True)):
        if buffer is None:
            held.buffers[i] = g
        elif g is not None:
            buffer.add_(g)
