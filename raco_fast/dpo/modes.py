"""The mode in which a model runs: evaluation, or training with or without its own noise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode for the block; every module returns to the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def begin_training(model: nn.Module, *, noise: bool) -> None:
    """Put a policy into the mode it learns in.

    Without noise that is evaluation mode, in which its reference is scored. What a model does in
    training alone would set the two apart from the first step on, and nobody can list it: dropout
    as a layer or as a number handed to a function, layers left out, jittered or sampled routing.
    An adapter keeps its own dropout, which it was given for training.

    Args:
        noise: whatever the model does in training mode.
    """
    model.train(noise)
    if noise:
        return
    for module in model.modules():
        if _recomputes(module):
            # Only in training mode it does. The layers inside of it stay in evaluation mode, and
            # its own probabilities are numbers.
            module.training = True
            _set_probabilities_to_zero(module)
        if _is_adapted(module):
            module.training = True
            for name, part in module.named_children():
                if name != "base_layer":
                    part.train()


def has_dropout(model: nn.Module) -> bool:
    """Whether a dropout layer is at work, such as an adapter's after `begin_training`."""
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in model.modules())


def _recomputes(module: nn.Module) -> bool:
    """Whether a layer computes its activations again in the backward pass.

    By checkpointing, or as a reversible layer (Reformer's).
    """
    checkpointing = getattr(module, "gradient_checkpointing", False) is True
    return checkpointing or callable(getattr(module, "backward_pass", None))


def _set_probabilities_to_zero(module: nn.Module) -> None:
    """Of a module itself, not of those in it."""
    for name, value in list(vars(module).items()):
        if "drop" in name and isinstance(value, float):
            setattr(module, name, 0.0)


def _is_adapted(module: nn.Module) -> bool:
    """Whether a PEFT adapter sits on this layer."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # absent: nobody has made one
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)
