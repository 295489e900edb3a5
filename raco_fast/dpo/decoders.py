"""A causal LM as a decoder and a head, where its logits are no more than that.

Scores need the hidden states of a few positions and the head, not all logits (`raco_fast.dpo.logps`
says why). That the logits of a model are `shape(head(decoder(tokens)))` is a property of its code:
BERT has further layers before the head, Llama 4 calls itself its decoder, others scale, cap or mask
their logits. So it is looked at once for every model, on one row of tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.sharded import as_forward, free_gathered
from raco_fast.engine.lm_head import LogitShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 64

_in_parts: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Of every model that has been looked at: whether its logits are the head of its decoder."""


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model itself, with PEFT's wrapper taken off (its layers stay)."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def decoder_of(causal_lm: nn.Module) -> nn.Module | None:
    """The part of a causal LM that turns tokens into hidden states; None where none is found."""
    head = _head_of(causal_lm)
    for candidate in _candidates(causal_lm):
        embeds = callable(getattr(candidate, "get_input_embeddings", None))
        if candidate is not causal_lm and candidate is not head and embeds:
            return candidate
    return None


def _candidates(causal_lm: Any) -> Iterator[nn.Module | None]:
    """What may be the decoder, the model's own answer first.

    transformers' `get_decoder` and `base_model` answer with the model itself where they know none.
    """
    get_decoder = getattr(causal_lm, "get_decoder", None)
    if get_decoder is not None:
        yield get_decoder()
    yield getattr(causal_lm, "base_model", None)
    yield from causal_lm.children()


def _head_of(causal_lm: Any) -> nn.Module | None:
    get_head = getattr(causal_lm, "get_output_embeddings", None)
    head: nn.Module | None = None if get_head is None else get_head()
    return head


def hidden_states(causal_lm: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, d]: the decoder's output, of a model that `is_in_parts`."""
    decoder = decoder_of(causal_lm)
    assert decoder is not None
    output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    states: Tensor = output.last_hidden_state
    return states


def logit_shape(config: Any) -> LogitShape:
    """What an architecture does to the head's output before the softmax.

    Gemma, RecurrentGemma and xLSTM cap logits, Granite divides them, Cohere multiplies them.
    """
    config = config.get_text_config()
    factor = (getattr(config, "logit_scale", None) or 1.0) / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return LogitShape(factor, next((c for n in caps if (c := getattr(config, n, None))), None))


def is_in_parts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> bool:
    """Whether a causal LM's logits are those of its head on its decoder's output.

    Looked at when it is first asked of a model, by two passes over a row; where they are not, a
    warning names the model and the reason.

    Args:
        model: as in `raco_fast.dpo.logps.sequence_logps`.
        input_ids, attention_mask: as there; of the longest row 64 tokens are used, for the model's
            own logits come whole.
    """
    causal_lm = unwrap(model)
    known = _in_parts.get(causal_lm)
    if known is None:
        longest = attention_mask.sum(1).argmax()
        row = input_ids[longest][attention_mask[longest].bool()]
        reason = _why_not(model, causal_lm, row[None, :_PROBE_TOKENS])
        known = _in_parts[causal_lm] = reason is None
        if reason is not None:
            logger.warning(
                "`model` (%s): %s, so scores are taken from all of its logits: exact, with memory "
                "for batch x length x vocabulary",
                type(causal_lm).__name__,
                reason,
            )
    return known


@torch.no_grad()
def _why_not(model: nn.Module, causal_lm: Any, row: Tensor) -> str | None:
    """Why a model is more than a decoder and a head; None where it is not."""
    if _head_of(causal_lm) is None:
        return "it has no output embeddings"
    if decoder_of(causal_lm) is None:
        return "its decoder cannot be told from the whole model"
    # Under autocast the two would be rounded in places of their own.
    with evaluating(model), torch.autocast(row.device.type, enabled=False):
        ours = as_forward(model, _from_parts)(row)
        theirs = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
        free_gathered(model)
    if ours is None:
        return "its decoder gives no `last_hidden_state`"
    if ours.shape != theirs.shape:
        return f"its head gives logits of shape {tuple(ours.shape)}, and it {tuple(theirs.shape)}"
    # The same numbers in the same order, but for where a scale or cap is rounded.
    rounding = torch.finfo(theirs.dtype).eps
    largest = ours.nan_to_num(0.0, 0.0, 0.0).abs().max()
    allowed = float((100 if rounding < 1e-4 else 2) * rounding * largest)
    if torch.allclose(ours, theirs.to(ours), rtol=0, atol=allowed, equal_nan=True):
        return None
    return (
        f"its logits are not those of its head on its decoder's output (they differ by "
        f"{float((ours - theirs).abs().max()):.2g})"
    )


def _from_parts(model: nn.Module, row: Tensor) -> Tensor | None:
    """Logits as the chunked head makes them; None where the decoder's output has no states."""
    causal_lm: Any = unwrap(model)
    output = decoder_of(causal_lm)(  # type: ignore[misc]
        input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
    )
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        return None
    y = causal_lm.get_output_embeddings()(states)
    return logit_shape(causal_lm.config)(y if y.dtype == torch.float64 else y.float())
