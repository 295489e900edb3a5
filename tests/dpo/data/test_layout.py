"""Which pairs of a step go through the model together, on one process and on several."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raco_fast.dpo.data.collation import PaddedRows
from raco_fast.dpo.data.layout import Layout, first_fit
from raco_fast.dpo.data.tokenization import EncodedPair

KINDS = ("pairs", "packed", "padded")

_shapes = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=40)
_kinds = st.sampled_from(KINDS)
_rooms = st.one_of(st.integers(1, 90), st.just(math.inf))


def pair(k: int, prompt: int = 2, a: int = 3, b: int = 1, **labels: int) -> EncodedPair:
    return EncodedPair(f"p{k:03}", [1] * prompt, [2] * a, [3] * b, labels)


def pairs_of(shapes) -> list[EncodedPair]:
    return [pair(k, *shape, x=1) for k, shape in enumerate(shapes)]


def expected_length(kind: str, p: EncodedPair) -> int:
    prompt, a, b = len(p.prompt_ids), len(p.a_ids), len(p.b_ids)
    return {
        "pairs": prompt + a + b,
        "packed": 2 * prompt + a + b,
        "padded": prompt + max(a, b),
    }[kind]


@given(_shapes, _kinds, st.integers(1, 8), _rooms, st.integers(1, 6))
def test_processes_share_a_step_evenly(shapes, kind, size, room, processes):
    """Every pair once, as many micro-batches everywhere, about as many tokens."""
    pairs, layout = pairs_of(shapes), Layout(kind, size, room, 0)
    rounds = layout.rounds(pairs, processes)
    assert rounds == layout.rounds(pairs[::-1], processes), "depends on the order of the input"
    assert all(len(each) == processes for each in rounds)
    shares = [[each[rank] for each in rounds] for rank in range(processes)]
    assert all(group for share in shares for group in share)
    own = [[p for group in share for p in group if p.labels["x"]] for share in shares]
    assert sorted(p.id for share in own for p in share) == [p.id for p in pairs]
    lengths = [sum(map(layout.length, share)) for share in own]
    assert max(lengths) - min(lengths) <= max(map(layout.length, pairs))
    assert max(map(len, own)) - min(map(len, own)) <= 1


@given(_shapes, _kinds, st.integers(1, 8), _rooms, st.integers(1, 6))
def test_a_share_is_filled_with_the_shortest_pair_without_labels(
    shapes, kind, size, room, processes
):
    pairs, layout = pairs_of(shapes), Layout(kind, size, room, 0)
    rounds = layout.rounds(pairs, processes)
    shortest = min(map(layout.length, pairs))
    for group in (group for each in rounds for group in each):
        filling = [p for p in group if not p.labels["x"]]
        assert not filling or (len(group) == 1 and layout.length(group[0]) == shortest)
    with_work = [sum(bool(e[r][0].labels["x"]) for e in rounds) for r in range(processes)]
    assert max(with_work) == len(rounds), "all processes run a pair that counts for none"


@given(_shapes, _kinds, st.integers(1, 8), _rooms)
def test_micro_batches_hold_what_there_is_room_for_longest_first(shapes, kind, size, room):
    pairs, layout = pairs_of(shapes), Layout(kind, size, room, 0)
    groups = [group for (group,) in layout.rounds(pairs)]
    assert [layout.length(p) for p in pairs] == [expected_length(kind, p) for p in pairs]
    first = [layout.length(group[0]) for group in groups]
    assert first == sorted(first, reverse=True)
    assert first[0] == max(map(layout.length, pairs)), "memory would run out late"
    for group in groups:
        within = [layout.length(p) for p in group]
        assert within == sorted(within, reverse=True)
        if kind == "padded":
            assert len(group) <= size
        else:
            assert sum(within) <= room or len(group) == 1
    if kind == "padded":
        assert len(groups) == math.ceil(len(pairs) / size)


@given(_shapes, st.integers(1, 90))
def test_no_bin_is_opened_while_another_has_room(shapes, room):
    pairs, length = pairs_of(shapes), Layout("pairs", 1, room, 0).length
    by_length = sorted(pairs, key=length, reverse=True)
    bins = first_fit(by_length, length, room)
    for k, opened in enumerate(bins[1:], start=1):
        for earlier in bins[:k]:
            # What lay there when this one was opened is of the same length or longer.
            before = [p for p in earlier if by_length.index(p) < by_length.index(opened[0])]
            assert sum(map(length, before)) + length(opened[0]) > room
    assert len(first_fit(by_length, length, math.inf)) == 1


def test_a_pair_longer_than_the_room_is_alone():
    pairs = [pair(0, 2, 3, 1), pair(1, 9, 9, 9), pair(2, 1, 1, 1)]
    groups = [group for (group,) in Layout("pairs", 1, 9, 0).rounds(pairs)]
    assert [[p.id for p in group] for group in groups] == [["p001"], ["p000", "p002"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_a_pair_runs_the_shortest_without_labels(kind):
    pairs = [pair(0, a=3, x=1), pair(1, a=9, x=-1)]
    pairs[0].pair_weights["x"] = 2.0
    rounds = Layout(kind, 2, 99, 0).rounds(pairs, 3)
    assert rounds == [[[pairs[1]], [pairs[0]], [pair(0, a=3, x=0)]]]


def test_what_without_a_graph_fits_is_more():
    layout = Layout("pairs", 3, 40, 7).scaled(2)
    assert (layout.pairs, layout.tokens, layout.kind, layout.pad_id) == (6, 80, "pairs", 7)
    assert Layout("packed", 3, math.inf, 7).scaled(2).tokens == math.inf


def test_a_batch_lies_as_the_layout_says():
    pairs = [pair(0), pair(1, 4, 5, 6)]
    tokens = {}
    for kind in KINDS:
        layout = Layout(kind, 2, math.inf, 9)
        rows = layout.batch(pairs).rows
        assert isinstance(rows, PaddedRows) == (kind == "padded")
        tokens[kind] = rows.input_ids.numel()
        if kind != "padded":
            assert tokens[kind] == sum(map(layout.length, pairs))
    assert tokens == {"pairs": 6 + 15, "packed": 8 + 19, "padded": 4 * 10}
