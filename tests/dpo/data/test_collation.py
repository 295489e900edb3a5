"""Encoded pairs as tensors: padded to one length, or packed into one row."""

import pytest
import torch

from raco_fast.dpo.data.collation import PaddedRows, collate, pack
from raco_fast.dpo.data.packed_rows import PackedRows
from raco_fast.dpo.data.tokenization import EncodedPair

PAIRS = [
    EncodedPair("x", [5, 6, 7], [8, 2], [9, 9, 9, 2], {"helpful": 1, "concise": 0}),
    EncodedPair("y", [5], [8, 8, 2], [2], {"helpful": -1, "concise": 1}),
]


def packed_in_pairs(pairs):
    return pack(pairs, share=True)


def padded(pairs):
    return collate(pairs, 99)


def test_padded_rows():
    rows = padded(PAIRS).rows
    assert isinstance(rows, PaddedRows)
    assert rows.input_ids.tolist() == [
        [5, 6, 7, 8, 2, 99, 99],
        [5, 8, 8, 2, 99, 99, 99],
        [5, 6, 7, 9, 9, 9, 2],
        [5, 2, 99, 99, 99, 99, 99],
    ]
    assert rows.attention_mask.tolist() == (rows.input_ids != 99).long().tolist()
    completion = [[3, 4], [1, 2, 3], [3, 4, 5, 6], [1]]
    assert [row.nonzero().flatten().tolist() for row in rows.completion_mask] == completion
    dtypes = (rows.input_ids.dtype, rows.attention_mask.dtype, rows.completion_mask.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.bool)


@pytest.mark.parametrize(
    ("share", "ids"),
    [
        (True, [5, 6, 7, 8, 2, 9, 9, 9, 2, 5, 8, 8, 2, 2]),
        (False, [5, 6, 7, 8, 2, 5, 6, 7, 9, 9, 9, 2, 5, 8, 8, 2, 5, 2]),
    ],
)
def test_packed_rows_hold_every_token_once_or_every_prompt_twice(share, ids):
    rows = pack(PAIRS, share=share).rows
    assert isinstance(rows, PackedRows)
    assert rows.input_ids.tolist() == [ids]
    assert bool((rows.shared_with >= 0).any()) == share


@pytest.mark.parametrize("batch_of", [padded, packed_in_pairs])
def test_what_a_batch_knows_beside_its_tokens(batch_of):
    batch = batch_of(PAIRS)
    assert (batch.tokens_a.tolist(), batch.tokens_b.tolist()) == ([2, 3], [4, 1])
    assert {k: v.tolist() for k, v in batch.labels.items()} == {
        "helpful": [1, -1],
        "concise": [0, 1],
    }
    assert batch.ids == ["x", "y"]
    assert batch.labels["helpful"].dtype == batch.tokens_a.dtype == torch.float32


@pytest.mark.parametrize("batch_of", [padded, packed_in_pairs])
def test_a_batch_holds_weights_where_some_pair_has_one(batch_of):
    pairs = [
        EncodedPair("p", [1], [2], [3], {"x": 0.5, "y": 1}, {"y": 4.0}),
        EncodedPair("q", [1], [2], [3], {"x": -0.75, "y": 0}),
    ]
    batch = batch_of(pairs)
    assert batch.labels["x"].tolist() == [0.5, -0.75]
    assert {n: w.tolist() for n, w in batch.pair_weights.items()} == {"y": [4.0, 1.0]}
    assert not batch_of(pairs[1:]).pair_weights


@pytest.mark.parametrize("batch_of", [padded, packed_in_pairs])
def test_what_is_no_batch_is_named(batch_of):
    with pytest.raises(ValueError, match="`pairs` must hold at least one pair, got none"):
        batch_of([])
    a, b = EncodedPair("x", [1], [2], [3], {"h": 1}), EncodedPair("y", [1], [2], [3], {"s": 1})
    with pytest.raises(
        ValueError, match=r"same objectives, got \['s'\] for 'y' and \['h'\] for 'x'"
    ):
        batch_of([a, b])
