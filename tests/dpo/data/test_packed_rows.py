"""Packed rows: every token once, and each scored token where it is predicted."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raco_fast.dpo import PackedRows, pair_rows
from raco_fast.dpo.data.packed_rows import row_length, shared_prefix

_tokens = st.integers(1, 4)  # few, so that responses begin alike
_pairs = st.lists(
    st.tuples(
        st.lists(_tokens, min_size=1, max_size=5), *[st.lists(_tokens, min_size=1, max_size=6)] * 2
    ),
    min_size=1,
    max_size=5,
)


def packed(pairs, share: bool) -> PackedRows:
    prompts, a, b = zip(*pairs, strict=True)
    return pair_rows(prompts, a, b, share=share)


def visible(rows: PackedRows, q: int) -> list[int]:
    """Tokens that q sees, in the order of their positions."""
    positions = rows.position_ids[0]
    seen = [
        k
        for k in range(rows.tokens)
        if rows.document[k] == rows.document[q]
        and int(rows.branch[k]) in (0, int(rows.branch[q]))
        and positions[k] <= positions[q]
    ]
    return sorted(seen, key=lambda k: int(positions[k]))


SOME = settings(max_examples=40)


@SOME
@given(_pairs, st.booleans())
def test_every_scored_token_is_predicted_from_its_own_conversation(pairs, share):
    rows = packed(pairs, share)
    B, read = len(pairs), Counter()
    expected = [(p, a) for p, a, _ in pairs] + [(p, b) for p, _, b in pairs]
    for source, target, score, place, past in zip(
        rows.sources, rows.targets, rows.scored, rows.place, rows.past, strict=True
    ):
        prompt, response = expected[score]
        k = int(place) - int(score) * rows.longest
        seen = visible(rows, int(source))
        assert rows.input_ids[0, seen].tolist() == [*prompt, *response][: len(prompt) + k]
        assert rows.position_ids[0, seen].tolist() == list(range(len(seen)))
        assert int(target) == response[k]
        shorter = min(len(expected[score % B][1]), len(expected[score % B + B][1]))
        assert bool(past) == (k >= shorter)
        read[int(score)] += 1
    assert [read[s] for s in range(2 * B)] == [len(response) for _, response in expected]


@SOME
@given(_pairs, st.booleans())
def test_rows_are_as_long_as_told_and_belong_to_the_scores_they_reach(pairs, share):
    rows = packed(pairs, share)
    assert rows.tokens == sum(row_length(*pair, share=share) for pair in pairs)
    assert rows.longest == max(len(x) for _, a, b in pairs for x in (a, b))
    reached = [set() for _ in range(rows.tokens)]
    for source, score in zip(rows.sources.tolist(), rows.scored.tolist(), strict=True):
        for k in visible(rows, source):
            reached[k].add(score)
    for k, scores in enumerate(reached):
        declared = {int(rows.sequence[k]), int(rows.shared_with[k])} - {-1}
        assert scores <= declared, "a row adds to a score that it was not declared for"


def test_the_common_beginning_of_the_responses_is_shared_as_well():
    rows = pair_rows([[1, 2]], [[3, 4, 5]], [[3, 4, 6, 7]])
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5]]
    assert rows.branch.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert rows.sequence.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert rows.shared_with.tolist() == [1, 1, 1, 1, -1, -1, -1]
    assert rows.sources.tolist() == [1, 2, 3, 1, 2, 3, 5]


def test_a_response_may_be_the_beginning_of_the_other():
    rows = pair_rows([[1]], [[2]], [[2, 3]])
    assert rows.input_ids.tolist() == [[1, 2, 3]]
    assert rows.sources.tolist() == [0, 0, 1]
    assert shared_prefix([2], [2, 3]) == 1


@SOME
@given(_pairs, st.integers(1, 3))
def test_copies_are_further_pairs(pairs, copies):
    rows = packed(pairs, share=True).repeated(copies)
    one = packed(pairs, share=True)
    S, T = 2 * len(pairs), one.tokens
    assert (rows.pairs, rows.tokens) == (copies * len(pairs), copies * T)
    for c in range(copies):
        of_copy, scored = slice(c * T, (c + 1) * T), slice(c * len(one.sources), None)
        assert torch.equal(rows.sequence[of_copy], one.sequence + c * S)
        second = torch.where(one.shared_with < 0, -1, one.shared_with + c * S)
        assert torch.equal(rows.shared_with[of_copy], second)
        assert torch.equal(rows.sources[scored][: len(one.sources)], one.sources + c * T)
        places = one.place + c * S * one.longest
        assert torch.equal(rows.place[scored][: len(one.place)], places)
    assert len(set(rows.document.tolist())) == copies * len(set(one.document.tolist()))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([], [], []), "must hold as many lists, at least one, got 0, 0 and 0"),
        (([[1]], [[1]], []), "got 1, 1 and 0; give every pair all three"),
        (([[1], []], [[1]] * 2, [[2]] * 2), r"`prompt_ids`\[1\] must hold at least one token"),
    ],
)
def test_what_cannot_be_packed_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        pair_rows(*arguments)
