"""Attention of packed rows on a CPU, document by document.

Documents do not see one another, and sdpa on a CPU computes what its mask then discards: T²
products for T packed tokens, where Σ L² of documents of length L will do. A GPU has flex_attention
and variable-length kernels for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from raco_fast.dpo.data.packed_rows import PackedRows

_NAME = "raco_fast_documents"
_lengths: ContextVar[list[int]] = ContextVar("raco_fast_document_lengths")


@contextmanager
def by_document(decoder: nn.Module, config: Any, rows: PackedRows) -> Iterator[None]:
    """Forward passes of these rows in the block attend document by document, if they use sdpa.

    Not with gradient checkpointing, which runs layers again when the block is over, and has to find
    the same operations.

    Args:
        decoder: transformers'; its masks have been made.
        config: of its attention layers.
    """
    if (
        config._attn_implementation != "sdpa"
        or rows.document.device.type != "cpu"
        or any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())
    ):
        yield
        return
    lengths = torch.unique_consecutive(rows.document, return_counts=True)[1].tolist()
    _register()
    token = _lengths.set(lengths)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        _lengths.reset(token)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' attention functions: q, k, v [1, heads, T, d] -> [1, T, heads, d]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = _lengths.get([])
    of_rows = {query.shape[2], key.shape[2], sum(lengths)}
    if attention_mask is None or len(of_rows) > 1 or options.get("position_bias") is not None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return whole
    found, start = [], 0
    # Split, whose backward pass puts the parts together; that of slices adds up whole tensors.
    parts = zip(*(torch.split(rows, lengths, 2) for rows in (query, key, value)), strict=True)
    for q, k, v in parts:
        here = slice(start, start + q.shape[2])
        mask = attention_mask[..., here, here]
        found.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
        start = here.stop
    return torch.cat(found, 1), None
