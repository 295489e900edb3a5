"""Sequence log-probabilities of packed rows: every token once, no logits beyond a block of them.

A decoder is handed one row of many sequences (`raco_fast.dpo.data.packed_rows`) with a mask in the
form that its attention takes: a bool or additive tensor for sdpa and eager attention; what others
take, such as flex_attention's BlockMask, transformers makes of the same function. Windows and
chunks are by position, for b's tokens lie further from their prompt than their positions say.

Whether a model can be run so is a property of its code, so it is looked at: `raco_fast.dpo.layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raco_fast.backends.transfer import sent
from raco_fast.dpo.data.packed_rows import PackedRows
from raco_fast.dpo.decoders import decoder_of, unwrap
from raco_fast.dpo.document_attention import by_document
from raco_fast.dpo.logps import check_chunk, head_logps
from raco_fast.dpo.sharded import as_forward, device_of
from raco_fast.engine.declaration import sequences

_Reach = Callable[[Tensor, Tensor], Tensor]
"""(positions of queries, of keys) -> whether the one looks as far as to the other."""
_Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows, heads, queries, keys), all as numbers -> whether a query sees a key."""


def packed_logps(
    model: nn.Module, rows: PackedRows, chunk_tokens: int = 256, weights: Tensor | None = None
) -> Tensor:
    """(Weighted) sum of the log-probabilities of each response.

    Args:
        model: a Hugging Face causal LM whose tokens meet in attention alone, also wrapped by PEFT,
            also under `fully_shard`. `raco_fast.dpo.layout.check_layout` tells whether it is one.
        rows: of B pairs, on any device.
        chunk_tokens: full rows of logits whose memory the head may take at any time.
        weights: floating-point [N] weight of each scored token.
    Returns:
        float32 [2B] on the model's device: responses a of all pairs, then responses b.
    Raises:
        ValueError: `chunk_tokens` below 1.
    """
    check_chunk(chunk_tokens)
    rows = rows.to(device_of(model), non_blocking=True)
    placed = as_forward(model, _placed_logps)(rows, chunk_tokens, weights)
    # Summed out here, as in `sequence_logps`: a loss's question stops short of a sharded model.
    scores: Tensor = placed.sum(-1)
    return scores


def _placed_logps(
    model: nn.Module, rows: PackedRows, chunk_tokens: int, weights: Tensor | None
) -> Tensor:
    """float32 [2B, longest response]: log-probabilities of the scored tokens, else 0."""
    causal_lm: Any = unwrap(model)
    dtype = causal_lm.get_input_embeddings().weight.dtype
    decoder: Any = decoder_of(causal_lm)
    config = causal_lm.config.get_text_config()
    masks = attention_masks(config, rows, dtype)
    with (
        sequences(rows.sequence, shared_with=rows.shared_with),
        by_document(decoder, config, rows),
    ):
        output = decoder(
            input_ids=rows.input_ids,
            attention_mask=masks,
            position_ids=rows.position_ids,
            use_cache=False,
        )
    hidden = output.last_hidden_state[0]
    with sequences(rows.scored):
        logps = head_logps(causal_lm, hidden[rows.sources], rows.targets, chunk_tokens)
    if weights is not None:
        logps = logps * sent(weights, logps.device).to(logps.dtype)
    # A scattered add has no fixed order on a GPU: placed, to be summed by row. Not a view, of which
    # FSDP2 warns where a wrapped model returns one.
    places = (rows.place // rows.longest, rows.place % rows.longest)
    return logps.new_zeros(2 * rows.pairs, rows.longest).index_put(places, logps)


def attention_masks(config: Any, rows: PackedRows, dtype: torch.dtype) -> Any:
    """What a decoder is given as `attention_mask`: a mask, or one for each kind of layer.

    Args:
        config: of the decoder.
        dtype: of its activations.
    """
    document, branch = rows.document, rows.branch
    positions = rows.position_ids[0]

    def mask(reach: _Reach | None) -> Any:
        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            together = (document[q] == document[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
            return together if reach is None else together & reach(positions[q], positions[k])

        return _causal_mask(config, sees, rows.tokens, dtype, positions.device)

    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    reaches: dict[str, _Reach | None] = {"full_attention": None}
    if window is not None:
        reaches["sliding_attention"] = lambda q, k: k > q - window
    if chunk is not None:
        reaches["chunked_attention"] = lambda q, k: k // chunk == q // chunk
    kinds = set(getattr(config, "layer_types", None) or [_only_kind(config)])
    masks = {kind: mask(reaches[kind]) for kind in sorted(kinds) if kind in reaches}
    return masks if len(kinds) > 1 else next(iter(masks.values()), None)


def _causal_mask(
    config: Any, sees: _Sees, tokens: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """Of one row of tokens: what a token sees of those not behind it.

    transformers calls a function that it does not know by vmap, which takes the host longer than a
    small model's forward pass. `sees` takes tensors of numbers as well.
    """
    from transformers import masking_utils as of

    known, name = of.ALL_MASK_ATTENTION_FUNCTIONS, config._attn_implementation
    form = known.get(name)
    if form not in (of.sdpa_mask, of.eager_mask) or not getattr(config, "is_causal", True):
        return of.create_causal_mask(
            config=config,
            inputs_embeds=torch.empty(1, tokens, 0, dtype=dtype, device=device),
            attention_mask=None,
            past_key_values=None,
            and_mask_function=sees,
        )
    index = torch.arange(tokens, device=device)
    row = index.new_zeros(())
    q, k = index[:, None], index[None]
    mask = ((k <= q) & sees(row, row, q, k))[None, None]
    if form is of.sdpa_mask:
        return mask
    return torch.where(mask, torch.zeros((), dtype=dtype, device=device), torch.finfo(dtype).min)


def _only_kind(config: Any) -> str:
    """The kind of all layers, of a config that does not list them."""
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
