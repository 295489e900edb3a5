"""How the pairs of a run are laid out: what its losses allow and its model can be run on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import pair_length
from raco_fast.dpo.data.layout import Kind, Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.registry import loss_name
from raco_fast.dpo.packable import why_not_packed
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.sharded import device_of

if TYPE_CHECKING:
    from raco_fast.dpo.run.inputs import RunInputs

logger = logging.getLogger(__name__)

TOKENS_ON_CPU = 512
"""Of a micro-batch, by default: products are at full speed, and attention over [T, T], of which a
CPU leaves nothing out, is still small beside them."""


def layout_of(config: TrainConfig, inputs: RunInputs, processes: Processes) -> Layout:
    """The layout of a run's micro-batches; the same on all processes, which all have to ask.

    Raises:
        ValueError: `batching` names one that the losses do not allow or the model cannot be run on.
    """
    wanted = config.batching
    unshared = None
    if config.gradient_mode != "autograd":  # which is exact for any rows
        unshared = why_not_shared(config.objective_losses)
    if wanted == "pairs" and unshared is not None:
        raise ValueError(
            f"`batching` 'pairs' is not for these losses: {unshared}; use 'packed' or 'auto'"
        )
    if wanted == "auto" and unshared is not None:
        logger.info("`batching`: every response has its prompt to itself, as %s", unshared)
    kinds: list[Kind] = ["packed"] if unshared else ["pairs", "packed"]
    reasons = []
    for kind in kinds if wanted == "auto" else [wanted]:
        layout = _sized(kind, config, inputs)
        reason = None if kind == "padded" else _why_not(layout, config, inputs, processes)
        if reason is None:
            return layout
        reasons.append(reason)
    if wanted != "auto":
        raise ValueError(
            f"`batching` {wanted!r} cannot be used with `model.name` {config.model.name!r}: "
            f"{reasons[-1]}; use 'padded' or 'auto'"
        )
    logger.warning("`model` cannot be run on packed rows, so batches are padded: %s", reasons[-1])
    return _sized("padded", config, inputs)


def _why_not(
    layout: Layout, config: TrainConfig, inputs: RunInputs, processes: Processes
) -> str | None:
    """Why the model cannot be run on such rows, by the longest pair of all data and two short ones.

    A window that is longer than the longest pair changes nothing.
    """
    pairs = [*inputs.training, *inputs.held_out]
    longest = max(pairs, key=lambda pair: (pair_length(pair), pair.id))
    shortest = sorted(pairs, key=lambda pair: (pair_length(pair), pair.id))[:2]
    few = {pair.id: pair for pair in (longest, *shortest)}
    reason = why_not_packed(inputs.model, list(few.values()), layout, config.chunk_tokens)
    return processes.say(reason)


def why_not_shared(losses: Mapping[str, PreferenceLoss]) -> str | None:
    """Why the responses of a pair may not share their prompt's rows in one backward pass.

    Losses with a tail weight of their own have scores of their own, so those are looked at apart.
    """
    seen: dict[float, tuple[str, object]] = {}
    for name, loss in losses.items():
        if loss.pair_function is None:
            return f"the loss {loss_name(loss)!r} of {name!r} is no function of h(a) - h(b)"
        first, h = seen.setdefault(loss.tail_weight, (name, loss.pair_function))
        if h != loss.pair_function:
            return f"the losses of {first!r} and {name!r} see a pair through different scores"
    return None


def _sized(kind: Kind, config: TrainConfig, inputs: RunInputs) -> Layout:
    """With the room that the config gives a micro-batch, or that of its number of pairs."""
    layout = Layout(kind, config.pairs_per_micro_batch, math.inf, inputs.pad_id)
    if kind == "padded" or config.gradient_mode == "gram_first":
        return layout  # the latter takes the whole step at once
    if config.tokens_per_micro_batch is not None:
        return layout.with_tokens(config.tokens_per_micro_batch)
    longest = _longest(inputs.training, layout)
    room = config.pairs_per_micro_batch * longest
    on_cpu = device_of(inputs.model) == torch.device("cpu")
    return layout.with_tokens(min(room, TOKENS_ON_CPU) if on_cpu else room)


def _longest(pairs: Sequence[EncodedPair], layout: Layout) -> int:
    return max(map(layout.length, pairs))
