"""One loss per objective, in the order of the weights, after the checks that name what is wrong."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from raco_fast.engine.backward import check_scores


def ordered_losses(
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    scores: Tensor | None,
    names: tuple[str, ...],
    given: tuple[str, ...] | None = None,
) -> list[Tensor]:
    """The losses of the objectives `names`, in that order; see `ObjectiveGradients.backward`.

    Args:
        losses: name -> scalar, or one scalar for each name.
        scores: [B] with a graph, or None; with scores a loss may be a constant.
        names: of the objectives.
        given: see `given_names`; the loss of another one is a constant. None: all.
    Raises:
        ValueError: objectives missing or unknown, wrong number, not a scalar, no graph.
        TypeError: neither a mapping nor a sequence, or a loss that is not a tensor.
    """
    if scores is not None:
        check_scores(scores)
    if isinstance(losses, Mapping):
        given = names if given is None else given
        missing = [name for name in given if name not in losses]
        unknown = [name for name in losses if name not in names]
        if missing or unknown:
            raise ValueError(
                f"`losses` must have exactly the objectives {names}, "
                f"missing {missing}, unknown {unknown}; correct the keys or `weights`"
            )
        nothing = torch.zeros(())
        ordered = [losses[name] if name in given else nothing for name in names]
    elif isinstance(losses, Sequence):
        if len(losses) != len(names):
            raise ValueError(f"`losses` must hold one loss for each of {names}, got {len(losses)}")
        ordered = list(losses)
    else:
        raise TypeError(
            f"`losses` must be a mapping from objective to loss or a list of losses, "
            f"got {type(losses).__name__}; write {{{names[0]!r}: loss, ...}}"
        )
    for name, loss in zip(names, ordered, strict=True):
        if given is None or name in given:
            _check_loss(name, loss, constants=scores is not None)
    return ordered


def refuse_constants(names: tuple[str, ...]) -> NoReturn:
    """Raise ValueError where no loss of any process has a graph."""
    raise ValueError(
        f"`losses` must have at least one that requires grad, got constants for all of {names}, so "
        f"there is nothing to learn from; compute them from `scores`, outside of torch.no_grad() "
        f"and without detaching, or leave this batch out"
    )


def given_names(
    losses: Mapping[str, Tensor] | Sequence[Tensor], weights: Mapping[str, float]
) -> tuple[str, ...]:
    """The objectives that must have a loss: not those of weight 0 that a mapping leaves out."""
    if not isinstance(losses, Mapping):
        return tuple(weights)
    return tuple(name for name, weight in weights.items() if weight > 0.0 or name in losses)


def _check_loss(name: str, loss: Tensor, constants: bool) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"`losses`[{name!r}] must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"`losses`[{name!r}] must be a scalar, got shape {list(loss.shape)}; take its mean"
        )
    if not (loss.requires_grad or constants):
        raise ValueError(
            f"`losses`[{name!r}] depends on nothing that requires grad, so it has no gradient; if "
            f"this batch has nothing for {name!r}, give a zero that keeps the graph, "
            f"e.g. `0.0 * scores.sum()`"
        )
