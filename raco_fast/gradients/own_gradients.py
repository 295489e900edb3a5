"""Gradients of replicas as one process has them before anybody averages them over processes.

DistributedDataParallel averages one gradient for each forward pass, so a backward pass of several
objectives leaves it alone: torch.autograd.grad runs no hook of DDP's, whatever its options, and
`step()` averages everything at once. An averaged gradient is never added to one's own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raco_fast.backends.arguments import check_dense
from raco_fast.distributed.dtensor import is_dtensor
from raco_fast.distributed.processes import Processes
from raco_fast.distributed.replicas import averages
from raco_fast.gradients.objective_grad import ObjectiveGrad, is_zero, stand_in_of


def refuse_averaged(params: Sequence[Tensor]) -> None:
    """Raise RuntimeError if p.grad has gradients that somebody has averaged; not of zeros."""
    for p in params:
        grad = p.grad
        if not isinstance(grad, ObjectiveGrad) or grad.unreduced is not None:
            continue
        if not is_zero(grad):
            raise RuntimeError(
                "backward(losses) cannot add to what `with objective(name):` left in p.grad: there "
                "whoever wraps the model averages over processes, here step() does; use one of "
                "both between two zero_grad()"
            )


def refuse_own(params: Sequence[Tensor]) -> None:
    """Raise RuntimeError if p.grad has gradients that step() is still to average; not of zeros."""
    for p in params:
        if not isinstance(p.grad, ObjectiveGrad) or p.grad.unreduced is None:
            continue
        if is_zero(p.grad):
            p.grad.unreduced = None
        else:
            raise RuntimeError(
                "`with objective(name):` cannot add to what backward(losses) left in p.grad: here "
                "whoever wraps the model averages over processes, there step() does; use one of "
                "both between two zero_grad()"
            )


def mark_own(params: Sequence[Tensor], names: tuple[str, ...], processes: Processes) -> None:
    """Note that step() has to average them; also of parameters that nothing here has touched.

    All processes then have p.grad of the same parameters, as GradScaler's collective needs it.
    """
    for p in params:
        if not is_dtensor(p):
            held = _held(p, names)
            held.unreduced = processes


def backward_of_each(
    losses: Sequence[Tensor], params: Sequence[Tensor], names: tuple[str, ...]
) -> None:
    """m backward passes that no wrapper notices; adds to p.grad's stand-ins.

    Raises:
        RuntimeError: a parameter has a hook that would not be run.
        TypeError: a sparse gradient.
    """
    refuse_hooks(params)
    learned = [(k, loss) for k, loss in enumerate(losses) if loss.requires_grad]
    for number, (index, loss) in enumerate(learned, start=1):
        retained = number < len(learned)
        found: list[Tensor | None] = [
            *torch.autograd.grad(loss, params, retain_graph=retained, allow_unused=True)
        ]
        for k, p in enumerate(params):
            g, found[k] = found[k], None
            if g is not None:
                check_dense(g, f"the gradient of objective {names[index]!r}")
                _add(p, index, names, g)


def averaged_backward(loss: Tensor, params: Sequence[Tensor], processes: Processes) -> None:
    """p.grad += the average over processes of the gradient of one objective's loss.

    As `loss.backward()` of a model in DistributedDataParallel, with or without one.
    """
    refuse_hooks(params)
    own: Sequence[Tensor | None] = [None] * len(params)
    if loss.requires_grad:
        own = torch.autograd.grad(loss, params, allow_unused=True)
    for g in own:
        if g is not None:
            check_dense(g, "the gradient of a parameter")
    for p, g in zip(params, averages(params, own, processes), strict=True):
        if g is not None:
            p.grad = g if p.grad is None else p.grad.add_(g)


def refuse_hooks(params: Sequence[Tensor]) -> None:
    """Raise RuntimeError if a parameter has a hook that would miss the gradients."""
    for p in params:
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"a parameter of shape {list(p.shape)} has a hook for accumulated gradients, which "
                f"backward(losses) does not run on several processes: gradients are averaged after "
                f"it; remove the hook, or call loss.backward() inside `with objective(name):`"
            )


@torch.no_grad()
def _add(p: Tensor, index: int, names: tuple[str, ...], g: Tensor) -> None:
    held = _held(p, names)
    buffer, held.products = held.buffers[index], None
    if buffer is None:
        # Not g itself, which may be another parameter's as well, or a view of something.
        buffer = held.buffers[index] = torch.empty_like(p, requires_grad=False)
        buffer.copy_(g)
    else:
        buffer.add_(g)


def _held(p: Tensor, names: tuple[str, ...]) -> ObjectiveGrad:
    held = stand_in_of(p, names)
    if held is None:
        p.grad = held = ObjectiveGrad(p, names)
    return held
