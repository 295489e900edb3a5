from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raco_fast.dpo.data.batches import BatchSchedule, labelled_counts, token_count
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


def test_token_count_is_of_both_sequences():
    assert token_count([pair(0, 2, 3, 1), pair(1, 5, 1, 1)]) == (5 + 3) + (6 + 6)


def test_labelled_counts_leave_zeros_out():
    pairs = [pair(0, x=1, y=0), pair(1, x=-1, y=0), pair(2, x=0, y=0), pair(3, x=1, y=-1)]
    assert labelled_counts(pairs, ["x", "y"]) == {"x": 3, "y": 1}
    with pytest.raises(KeyError):
        labelled_counts(pairs, ["z"])
