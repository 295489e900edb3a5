"""Encoded pairs as a batch of tensors: padded to one length, or packed into one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raco_fast.dpo.data.packed_rows import PackedRows, pair_rows
from raco_fast.dpo.data.tokenization import EncodedPair


@dataclass(frozen=True)
class PaddedRows:
    """The 2B responses of B pairs, right-padded to T tokens: responses a, then b.

    Attributes:
        input_ids: int64 [2B, T].
        attention_mask: int64 [2B, T], 0 on padding.
        completion_mask: bool [2B, T], true on the tokens of the response, stop token included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor


@dataclass(frozen=True)
class PairBatch:
    """B pairs, ready to be scored.

    Attributes:
        rows: their tokens; scores are numbered as 2B rows, responses a, then b.
        labels: objective -> float32 [B]: 0, or the sign times the probability that it is right.
        ids: the B pair ids.
        tokens_a, tokens_b: float32 [B], tokens of each response.
        pair_weights: objective -> float32 [B]; of objectives with a weight other than 1.
    """

    rows: PaddedRows | PackedRows
    labels: dict[str, Tensor]
    ids: list[str]
    tokens_a: Tensor
    tokens_b: Tensor
    pair_weights: dict[str, Tensor] = field(default_factory=dict)


def collate(pairs: Sequence[EncodedPair], pad_id: int) -> PairBatch:
    """Pad pairs to one batch.

    Args:
        pairs: B encoded pairs that label the same objectives.
        pad_id: token id of the padding; masked, so any valid id serves (EOS is usual).
    Raises:
        ValueError: no pairs, or pairs that label different objectives.
    """
    _check_labels(pairs)
    responses = [(p.prompt_ids, p.a_ids) for p in pairs] + [(p.prompt_ids, p.b_ids) for p in pairs]
    length = max(len(prompt) + len(response) for prompt, response in responses)
    input_ids = torch.full((len(responses), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for k, (prompt, response) in enumerate(responses):
        end = len(prompt) + len(response)
        input_ids[k, :end] = torch.tensor(prompt + response, dtype=torch.int64)
        attention_mask[k, :end] = 1
        completion_mask[k, len(prompt) : end] = True
    return _batch(pairs, PaddedRows(input_ids, attention_mask, completion_mask))


def pack(pairs: Sequence[EncodedPair], *, share: bool) -> PairBatch:
    """Pack pairs into one row of tokens.

    Args:
        pairs: as for `collate`.
        share: as for `pair_rows`.
    Raises:
        ValueError: as `collate`.
    """
    _check_labels(pairs)
    ids = ([p.prompt_ids for p in pairs], [p.a_ids for p in pairs], [p.b_ids for p in pairs])
    return _batch(pairs, pair_rows(*ids, share=share))


def _check_labels(pairs: Sequence[EncodedPair]) -> None:
    if not pairs:
        raise ValueError("`pairs` must hold at least one pair, got none; skip empty batches")
    names = set(pairs[0].labels)
    for pair in pairs:
        if set(pair.labels) != names:
            raise ValueError(
                f"`pairs` must label the same objectives, got {sorted(pair.labels)} for "
                f"{pair.id!r} and {sorted(names)} for {pairs[0].id!r}; label the rest 0"
            )


def _batch(pairs: Sequence[EncodedPair], rows: PaddedRows | PackedRows) -> PairBatch:
    names = list(pairs[0].labels)
    weighted = [n for n in names if any(n in p.pair_weights for p in pairs)]
    return PairBatch(
        rows,
        {n: torch.tensor([p.labels[n] for p in pairs], dtype=torch.float32) for n in names},
        [p.id for p in pairs],
        torch.tensor([len(p.a_ids) for p in pairs], dtype=torch.float32),
        torch.tensor([len(p.b_ids) for p in pairs], dtype=torch.float32),
        {n: torch.tensor([p.pair_weights.get(n, 1.0) for p in pairs]) for n in weighted},
    )
