"""What a run does whose losses, gradients or weights are no longer finite.

A step with such a gradient is skipped: it changes neither weights nor optimizer state. One is a bad
pair; where they do not end, the run has diverged, and what is saved must not pass for its result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import local
from raco_fast.dpo.models import trainable
from raco_fast.dpo.run.checkpoint import TrainingState, latest
from raco_fast.dpo.run.step import StepResult

logger = logging.getLogger(__name__)

_CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class DivergedError(Exception):
    """A run has ended with steps that could not be taken, or with weights that are not finite."""


def names_of_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors with a NaN or an infinity in them."""
    return [n for n, t in tensors if t.dtype in _CHECKED and not bool(t.detach().isfinite().all())]


def note_skipped(result: StepResult, state: TrainingState, most: int | None, folder: Path) -> None:
    """Count the steps skipped in a row, and say what was not finite; every process calls this.

    Args:
        result: of the step that `state` has just counted.
        most: so many end the run; None: none do.
        folder: of the checkpoints.
    Raises:
        DivergedError: there are `most`.
    """
    if result.solution is None:
        return  # without labels it does not show whether the next one can be taken
    if not result.skipped:
        state.skipped_in_a_row = 0
        return
    state.skipped_in_a_row += 1
    objectives = ", ".join(map(repr, result.not_finite())) or "the combination"
    logger.warning(
        "step %d: a loss or gradient of %s is not finite; the step was skipped (%d so far), "
        "weights and optimizer state are unchanged",
        state.step,
        objectives,
        result.skipped_steps,
    )
    if most is not None and state.skipped_in_a_row >= most:
        raise DivergedError(
            f"stopped after step {state.step}: the last {state.skipped_in_a_row} steps were all "
            f"skipped (`max_skipped_steps`), this one because a loss or gradient of {objectives} "
            f"is not finite. The weights are as they were before them, and no model is saved; "
            f"{_left_in(folder)}. The same settings would come to the same point: choose a lower "
            f"`lr`, or look at the pairs of these steps"
        )


def check_weights(state: TrainingState, folder: Path) -> None:
    """Look at the weights before a checkpoint takes the place of an earlier one.

    Args:
        folder: of the checkpoints.
    Raises:
        DivergedError: one that was trained is not finite, on any process.
    """
    named = trainable(state.model).items()
    wrong: Sequence[str] = names_of_not_finite((name, local(p)) for name, p in named)
    first = state.processes.say(wrong[0] if wrong else None)
    if first is not None:
        raise DivergedError(
            f"after step {state.step} trained weights are not finite, the first in {first!r}; they "
            f"are not saved, and {_left_in(folder)}. The same settings would come to the same "
            f"point: choose a lower `lr`, or set `max_grad_norm`"
        )


def ended_skipping(state: TrainingState, model: Path | None) -> DivergedError:
    """What ends a run whose last steps were skipped, fewer of them than make it stop.

    Args:
        model: the folder that the model was saved in; None where no step was taken at all.
    """
    saved = f"{model} holds the weights from before them" if model else "nothing was learnt"
    return DivergedError(
        f"the run has come to its end at step {state.step}, but its last {state.skipped_in_a_row} "
        f"step(s) were skipped because a loss or gradient was not finite: {saved}. Choose a lower "
        f"`lr`, or look at the pairs of these steps"
    )


def _left_in(folder: Path) -> str:
    found = latest(folder)
    return f"{found} is left to resume from" if found else "there is no checkpoint to resume from"
