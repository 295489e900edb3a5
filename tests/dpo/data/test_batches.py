import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raco_fast.dpo.data.batches import (
    BatchSchedule,
    labelled_counts,
    micro_batches,
    pair_length,
    token_count,
)
from raco_fast.dpo.data.tokenization import EncodedPair


def pair(k: int, prompt: int = 2, a: int = 3, b: int = 1, **labels: int) -> EncodedPair:
    return EncodedPair(f"p{k:03}", [1] * prompt, [2] * a, [3] * b, labels)


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 99))
def test_every_pair_comes_once_an_epoch_in_an_order_of_its_own(n, per_step, seed):
    schedule = BatchSchedule(n, per_step, seed)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        batches = [schedule.indices(step) for step in steps]
        assert all(len(batch) == per_step for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= per_step
        epochs.append([k for batch in batches for k in batch])
        assert Counter(epochs[-1]) == Counter(range(n))
    if n > 12:
        assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_is_a_function_of_its_number_and_the_seed():
    schedule = BatchSchedule(20, 6, seed=3)
    assert schedule.steps_per_epoch == 4
    assert [schedule.indices(k) for k in (5, 2)] == [
        BatchSchedule(20, 6, seed=3).indices(k) for k in (5, 2)
    ]
    assert schedule.indices(0) != BatchSchedule(20, 6, seed=4).indices(0)
    assert [schedule.epoch(k) for k in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 2.25]


@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=30), st.integers(1, 8))
def test_micro_batches_hold_like_lengths_longest_first(shapes, size):
    pairs = [pair(k, *shape) for k, shape in enumerate(shapes)]
    groups = micro_batches(pairs, size)
    assert sorted(p.id for group in groups for p in group) == [p.id for p in pairs]
    assert all(len(group) == size for group in groups[:-1])
    lengths = [pair_length(p) for group in groups for p in group]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == max(p + max(a, b) for p, a, b in shapes)
    assert micro_batches(pairs[::-1], size) == groups


@given(
    st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=40),
    st.integers(1, 8),
    st.integers(1, 6),
)
def test_processes_share_a_step_evenly(shapes, size, processes):
    """Every pair once, as many micro-batches everywhere, about as many tokens."""
    pairs = [pair(k, *shape, x=1) for k, shape in enumerate(shapes)]
    shares = [micro_batches(pairs, size, rank, processes) for rank in range(processes)]
    assert shares == [
        micro_batches(pairs[::-1], size, rank, processes) for rank in range(processes)
    ]
    assert {len(share) for share in shares} == {math.ceil(len(pairs) / (processes * size))}
    assert all(1 <= len(group) <= size for share in shares for group in share)
    own = [[p for group in share for p in group if p.labels["x"]] for share in shares]
    assert sorted(p.id for share in own for p in share) == [p.id for p in pairs]
    filling = [p for share in shares for group in share for p in group if not p.labels["x"]]
    assert len(filling) == sum(len(group) for share in shares for group in share) - len(pairs)
    assert all(pair_length(p) == min(map(pair_length, pairs)) for p in filling)
    lengths = [sum(map(pair_length, share)) for share in own]
    assert max(lengths) - min(lengths) <= max(map(pair_length, pairs))
    assert max(map(len, own)) - min(map(len, own)) <= 1


def test_a_process_without_a_pair_runs_the_shortest_without_labels():
    pairs = [pair(0, a=3, x=1), pair(1, a=9, x=-1)]
    pairs[0].pair_weights["x"] = 2.0
    assert micro_batches(pairs, 2, 0, 3) == [[pairs[1]]]
    assert micro_batches(pairs, 2, 1, 3) == [[pairs[0]]]
    assert micro_batches(pairs, 2, 2, 3) == [[pair(0, a=3, x=0)]]


def test_token_count_is_of_both_sequences():
    assert token_count([pair(0, 2, 3, 1), pair(1, 5, 1, 1)]) == (5 + 3) + (6 + 6)


def test_labelled_counts_leave_zeros_out():
    pairs = [pair(0, x=1, y=0), pair(1, x=-1, y=0), pair(2, x=0, y=0), pair(3, x=1, y=-1)]
    assert labelled_counts(pairs, ["x", "y"]) == {"x": 3, "y": 1}
    with pytest.raises(KeyError):
        labelled_counts(pairs, ["z"])
