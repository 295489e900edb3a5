"""`verify`: hold one backward pass against autograd on the user's own model and batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from raco_fast.gradients import ObjectiveGradients
from raco_fast.objective_losses import ordered_losses
from raco_fast.prepared import prepare, without_taps

Batch = Callable[[nn.Module], tuple[Mapping[str, Tensor], Tensor]]
"""model -> (objective name -> loss, scores [B]), with a fresh graph at every call."""


def verify(model: nn.Module, batch: Batch, *, quiet: bool = False) -> dict[str, float]:
    """Compare the gradients of one backward pass with those of one pass per objective.

    The model's gradients are left as they were; random numbers (dropout) start alike in both.

    Args:
        model: with or without `prepare`.
        batch: runs the model once and returns its losses and scores.
        quiet: do not print the table.
    Returns:
        Parameter name -> ||G' - G|| / ||G|| over all objectives, G by autograd, largest first: a
        few units in the last place of the parameters' dtype when all is well.
    Raises:
        ValueError, RuntimeError: one backward pass is not exact for this model; says why.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    held = [(p, p.grad) for p in names]
    try:
        with without_taps():
            expected = _gradients(model, batch, list(names), in_one=False)
        with prepare(model, strict=True):
            found = _gradients(model, batch, list(names), in_one=True)
    finally:
        for p, grad in held:
            p.grad = grad
    errors = {name: _relative_error(found[p], expected[p]) for p, name in names.items()}
    errors = dict(sorted(errors.items(), key=lambda item: -item[1]))
    if not quiet:
        width = max(map(len, errors))
        print("\n".join(f"{name:<{width}}  {error:.1e}" for name, error in errors.items()))
    return errors


def _gradients(
    model: nn.Module, batch: Batch, params: list[nn.Parameter], *, in_one: bool
) -> dict[nn.Parameter, list[Tensor | None]]:
    for p in params:
        p.grad = None
    devices = [p.device for p in params if p.is_cuda][:1]
    with torch.random.fork_rng(devices):
        losses, scores = batch(model)
        gradients = ObjectiveGradients(params, dict.fromkeys(losses, 1 / len(losses)))
        if in_one and not gradients.exact(ordered_losses(losses, scores, gradients.names), scores):
            raise ValueError(
                "`model` cannot be verified: one backward pass is not exact for it; the warning "
                "above says why"
            )
        gradients.backward(losses, scores=scores if in_one else None)
    return {p: list(gradients.of(p).values()) for p in params}


def _relative_error(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    difference = size = 0.0
    for a, b in zip(found, expected, strict=True):
        ours, theirs = (0.0 if g is None else g.double() for g in (a, b))
        difference += float(torch.as_tensor(ours - theirs).square().sum())
        size += float(torch.as_tensor(theirs).square().sum())
    return math.sqrt(difference / size if size else difference)
