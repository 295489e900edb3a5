"""Sequence log-probabilities without full logits.

A causal LM's logits are [batch, length, vocab]: for 8 sequences of 1024 tokens and a vocabulary of
128k, 4 GiB in fp32, several times that with its log-softmax and gradient. Only the positions whose
next token belongs to the response are scored, so their hidden states are gathered into [N, d], and
`raco_fast.engine.lm_head` runs the head on them in blocks. A model that is more than a decoder and
a head (`raco_fast.dpo.decoders`) is asked for its own logits instead.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raco_fast.backends.transfer import sent
from raco_fast.dpo.decoders import hidden_states, is_in_parts, logit_shape, unwrap
from raco_fast.dpo.given_logits import unrounded
from raco_fast.dpo.sharded import as_forward
from raco_fast.engine.declaration import declared, sequences
from raco_fast.engine.lm_head import token_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scored: TypeAlias = tuple[Tensor, Tensor]
"""int64 [N] rows and columns of the scored tokens."""


def sequence_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    chunk_tokens: int = 256,
) -> Tensor:
    """(Weighted) sum of the log-probabilities of each row's completion.

    Args:
        model: a Hugging Face causal LM, also wrapped by PEFT, also under `fully_shard`.
        input_ids: int64 [B, T] on the model's device, right-padded.
        attention_mask: [B, T] beside it, 1 on tokens, 0 on padding.
        completion_mask: [B, T], true where the token is scored, or, floating-point, its weight;
            column 0 cannot be scored (nothing predicts it). Best on the CPU: finding the scored
            tokens of a mask on a GPU waits for that GPU.
        chunk_tokens: full rows of logits whose memory the head may take at any time.
    Returns:
        float32 [B]: sum over scored t of weight · log p(input_ids[b, t] | input_ids[b, :t]).
    Raises:
        ValueError: a scored token in column 0, masks of another shape than `input_ids`, or
            `chunk_tokens` below 1.
    """
    check_chunk(chunk_tokens)
    if not input_ids.shape == attention_mask.shape == completion_mask.shape:
        raise ValueError(
            "`input_ids`, `attention_mask` and `completion_mask` must share one [B, T] shape, got "
            f"{tuple(input_ids.shape)}, {tuple(attention_mask.shape)}, "
            f"{tuple(completion_mask.shape)}"
        )
    rows, columns = completion_mask.nonzero(as_tuple=True)
    if bool((columns == 0).any()):
        raise ValueError(
            "`completion_mask` marks the first token of a row, which nothing predicts; "
            "start the row with at least one prompt or BOS token"
        )
    of_tokens = completion_mask[rows, columns] if completion_mask.is_floating_point() else None
    given = (input_ids, attention_mask, (rows, columns), of_tokens)
    if is_in_parts(model, input_ids, attention_mask):
        placed = as_forward(model, _placed_logps)(*given, chunk_tokens)
    else:
        placed = _logps_of_all_logits(model, *given)
    # Summed out here: what a loss asks of the scores then stops short of a sharded model, which
    # would gather its parameters for each of them.
    scores: Tensor = placed.sum(-1)
    return scores


def check_chunk(chunk_tokens: int) -> None:
    """Raise ValueError for a `chunk_tokens` below 1."""
    if chunk_tokens < 1:
        raise ValueError(f"`chunk_tokens` must be at least 1, got {chunk_tokens}; 256 is usual")


def _placed_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    scored: Scored,
    of_tokens: Tensor | None,
    chunk_tokens: int,
) -> Tensor:
    """float32 [B, T]: (weighted) log-probabilities of the `scored` (rows, columns), else 0."""
    causal_lm = unwrap(model)
    hidden = hidden_states(causal_lm, input_ids, attention_mask)
    rows, columns = (sent(index, hidden.device) for index in scored)
    with sequences(scored[0]):  # which sequence each row of the head belongs to
        logps = head_logps(
            causal_lm, hidden[rows, columns - 1], input_ids[rows, columns], chunk_tokens
        )
    return _placed(logps, (rows, columns), of_tokens, input_ids)


def _logps_of_all_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    scored: Scored,
    of_tokens: Tensor | None,
) -> Tensor:
    """The same from the model's own logits."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    rows, columns = (sent(index, logits.device) for index in scored)
    chosen = unrounded(unwrap(model), logits[rows, columns - 1])
    logps = -F.cross_entropy(chosen, input_ids[rows, columns], reduction="none")
    return _placed(logps, (rows, columns), of_tokens, input_ids)


def _placed(logps: Tensor, scored: Scored, of_tokens: Tensor | None, input_ids: Tensor) -> Tensor:
    """[B, T] of [N]: placed, to be summed by row; a scattered add has no fixed order on a GPU."""
    if of_tokens is not None:
        logps = logps * sent(of_tokens, logps.device).to(logps.dtype)
    return logps.new_zeros(input_ids.shape).index_put(scored, logps)


def head_logps(
    causal_lm: PreTrainedModel, hidden: Tensor, targets: Tensor, chunk_tokens: int
) -> Tensor:
    """float32 [N] log-probabilities of `targets` [N] after `hidden` [N, d]."""
    head = causal_lm.get_output_embeddings()
    shape = logit_shape(causal_lm.config)
    # A subclass may compute something else, or hold its weight in fewer bits. PEFT's
    # `modules_to_save` wraps a trained head and passes its attributes on.
    if type(head).forward is nn.Linear.forward or hasattr(head, "modules_to_save"):
        max_logits = chunk_tokens * len(head.weight)
        return token_logps(
            hidden, head.weight, head.bias, targets, shape=shape, max_logits=max_logits
        )

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = shape(unrounded(head, head(hidden)))
        return -F.cross_entropy(logits, targets, reduction="none")

    # Such a head, or one with an adapter inside, has no weight to cut, so its tokens are cut.
    of_rows = declared()
    pieces = []
    for start in range(0, len(targets), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        with nullcontext() if of_rows is None else sequences(of_rows.index[rows]):
            pieces.append(checkpoint(chunk, hidden[rows], targets[rows], use_reentrant=False))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)
