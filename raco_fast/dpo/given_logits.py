"""Logits that a model's own code has made, and what is to be said where they were rounded.

`raco_fast.engine.lm_head` never rounds logits. Where a head has an adapter inside, or a model does
more than a head, the logits come from the model, in its dtype.
"""

from __future__ import annotations

import logging
from weakref import WeakSet

from torch import Tensor, nn

from raco_fast.backends.weight_grad import widened

logger = logging.getLogger(__name__)

_told: WeakSet[nn.Module] = WeakSet()


def unrounded(source: nn.Module, logits: Tensor) -> Tensor:
    """`logits` in float32 or wider; says once of a model or head that its own are rounded."""
    wide = widened(logits)
    if wide is not logits and source not in _told:
        _told.add(source)
        logger.warning(
            "the logits of %s come in %s: rounded to it, they alone put noise on a margin, about "
            "0.2 nats at 32 tokens, that grows with the root of the length; "
            "`model.dtype: fp32` has none of it, nor has a head that is a plain linear layer",
            type(source).__name__,
            str(logits.dtype).removeprefix("torch."),
        )
    return wide
