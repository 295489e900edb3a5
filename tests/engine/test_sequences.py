"""A = U · seeds: what the factors must keep, and which rows belong to which sequence."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from raco_fast.engine import sequences as of_engine
from raco_fast.engine.declaration import Declared, declared, sequences
from raco_fast.engine.sequences import Factored

CPU = torch.device("cpu")
EPS32 = torch.finfo(torch.float32).eps


def product(factored: Factored) -> Tensor:
    """[m, B] that the factors stand for; a sequence without a group has zeros."""
    U = torch.cat(
        [factored.coefficients, factored.coefficients.new_zeros(len(factored.coefficients), 1)], 1
    )
    return U[:, factored.group] * factored.seeds


@st.composite
def sensitivities(draw) -> Tensor:
    """[m, B] with zero columns, pairs (c, -c), multiples of columns, scales far apart."""
    m, pairs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    A = torch.randn(m, pairs, generator=generator, dtype=torch.float64)
    A *= torch.rand(m, pairs, generator=generator) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    A *= 10.0 ** -torch.randint(0, draw(st.integers(1, 12)), (m, 1), generator=generator)
    A *= 10.0 ** -torch.randint(0, draw(st.integers(1, 12)), (1, pairs), generator=generator)
    if draw(st.booleans()):
        A[:, -1] = A[:, 0] * 0.37
    if draw(st.booleans()):
        A[0] = 0.7  # beside which the other objectives are small
    return torch.stack([A, -A], 2).flatten(1).float().double()


@given(sensitivities())
def test_the_factors_give_back_every_entry(A):
    torch.testing.assert_close(product(Factored.of(A)), A, rtol=5 * EPS32, atol=0.0)


@given(sensitivities())
def test_sequences_without_a_gradient_have_no_group(A):
    factored = Factored.of(A)
    assert torch.equal(factored.group < 0, (A == 0).all(0))
    assert torch.equal(factored.seeds == 0, (A == 0).all(0))
    used = factored.group[factored.group >= 0].unique().tolist()
    assert used == list(range(factored.coefficients.shape[1]))


@given(sensitivities())
def test_both_responses_of_a_pair_share_a_group(A):
    group = Factored.of(A).group
    assert torch.equal(group[0::2], group[1::2])


@given(sensitivities())
def test_seeds_are_entries_of_their_column_within_two_of_its_largest(A):
    factored = Factored.of(A)
    largest = A.abs().amax(0)
    assert bool((factored.seeds.abs() >= largest / 2).all())
    assert bool((factored.seeds == A).any(0).all())


@given(sensitivities(), st.randoms(use_true_random=False))
def test_the_order_of_sequences_and_objectives_does_not_matter(A, random):
    columns, rows = list(range(A.shape[1])), list(range(A.shape[0]))
    random.shuffle(columns)
    random.shuffle(rows)
    moved = Factored.of(A[rows][:, columns])
    torch.testing.assert_close(product(moved), A[rows][:, columns], rtol=5 * EPS32, atol=0.0)
    assert moved.coefficients.shape[1] == Factored.of(A).coefficients.shape[1]


@given(sensitivities(), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.data())
def test_a_value_that_is_not_finite_is_kept(A, value, data):
    i = data.draw(st.integers(0, A.shape[0] - 1))
    b = data.draw(st.integers(0, A.shape[1] - 1))
    A[i, b] = value
    found = product(Factored.of(A))
    assert not found[i, b].isfinite()
    others = torch.arange(A.shape[1]) != b
    torch.testing.assert_close(found[:, others], A[:, others], rtol=5 * EPS32, atol=0.0)


def test_what_the_objectives_agree_on_costs_one_group():
    agreed, disputed = (
        torch.tensor([0.2, 0.3, 0.1]),
        torch.tensor([[0.2, -0.4, 0.1], [0.2, 0.4, 0]]),
    )
    A = torch.stack([agreed, -agreed, 3 * agreed, *disputed], 1)
    assert Factored.of(A).group.tolist() == [0, 0, 0, 1, 2]


def test_columns_that_are_compared_a_few_at_a_time_join_the_same_groups(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    A = directions[:, torch.randint(0, 7, (40,), generator=generator)] * torch.randn(40)
    A[:, 11] = 0.0
    whole = Factored.of(A)
    for numbers in (1, 500):
        monkeypatch.setattr(of_engine, "_COMPARED_AT_ONCE", numbers)
        parts = Factored.of(A)
        assert torch.equal(parts.group, whole.group)
        assert torch.equal(parts.coefficients, whole.coefficients)
    assert whole.coefficients.shape[1] == 7


def test_columns_that_differ_in_a_small_entry_only_are_apart():
    A = torch.tensor([[1.0, 1.0], [1e-6, 1.4e-6]])
    assert Factored.of(A).group.tolist() == [0, 1]


@given(sensitivities(), st.integers(0, 10**6))
def test_segments_hold_every_row_of_a_group_once_and_in_order(A, seed):
    assume(bool(A.any()))
    factored = Factored.of(A)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, A.shape[1], (17,), generator=generator)
    segments = factored.segments(Declared(index), CPU)
    x = torch.arange(17.0)[:, None] * torch.ones(1, 2)
    rows = segments.arranged(x)[:, 0, 0].long()
    group = factored.group[index]
    assert rows.numel() == int((group >= 0).sum()) == segments.offsets[-1]
    for g in range(segments.count):
        of_g = rows[segments.offsets[g] : segments.offsets[g + 1]]
        assert torch.equal(of_g, (group == g).nonzero().flatten())
        assert bool(
            (segments.of_rows(1, CPU)[segments.offsets[g] : segments.offsets[g + 1]] == g).all()
        )
    back = segments.restored(segments.arranged(x), x)
    assert torch.equal(back, torch.where((group >= 0)[:, None], x, 0.0))


def test_inner_rows_follow_their_sequence():
    segments = Factored.of(torch.tensor([[1.0, 1.0, 0.0, 2.0], [1.0, 2.0, 0.0, 2.0]])).segments(
        None, CPU
    )
    x = torch.arange(24.0).reshape(4, 3, 2)
    assert segments.offsets == (0, 2, 3)
    assert torch.equal(segments.arranged(x), x[[0, 3, 1]])
    assert segments.of_rows(3, CPU).tolist() == [0] * 6 + [1] * 3
    assert torch.equal(
        segments.restored(x[[0, 3, 1]], x), x * torch.tensor([1, 1, 0, 1])[:, None, None]
    )


def test_rows_that_lie_in_order_are_not_moved():
    x = torch.ones(4, 3, 2)
    segments = Factored.of(torch.tensor([[1.0, 2.0, 1.0, 1.0], [1.0, 2.0, 2.0, 2.0]])).segments(
        None, CPU
    )
    assert segments.arranged(x).data_ptr() == x.data_ptr()


def test_an_index_is_recognised_by_identity_for_as_long_as_the_factors_live():
    factored = Factored.of(torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
    for order in ([0, 1, 1], [1, 0, 0], [0, 0, 1]):
        index = Declared(torch.tensor(order))  # dropped at once: the next may get its address
        expected = (factored.group[index.index] == 0).sum()
        assert factored.segments(index, CPU).offsets == (0, expected, 3)
    index = Declared(torch.tensor([0, 1]))
    assert factored.segments(index, CPU) is factored.segments(index, CPU)


def test_sequences_declares_inside_the_block_only():
    assert declared() is None
    with sequences([2, 0]):
        assert declared().index.tolist() == [2, 0]
        with sequences(cu_seqlens=torch.tensor([0, 2, 2, 5], dtype=torch.int32)):
            assert declared().index.tolist() == [0, 0, 2, 2, 2]
        assert declared().index.tolist() == [2, 0]
    assert declared() is None


@pytest.mark.parametrize("arguments", [{}, {"index": [0], "cu_seqlens": [0, 1]}])
def test_sequences_takes_one_of_its_arguments(arguments):
    with (
        pytest.raises(ValueError, match="takes either `index` or `cu_seqlens`"),
        sequences(**arguments),
    ):
        pass


def test_a_negative_index_is_refused():
    with (
        pytest.raises(ValueError, match=r"`index` must hold positions in `scores`, from 0, got -1"),
        sequences([0, -1]),
    ):
        pass


@pytest.mark.parametrize("offsets", [[0], [1, 3], [0, 4, 3], []])
def test_offsets_that_do_not_grow_from_zero_are_refused(offsets):
    with (
        pytest.raises(
            ValueError, match=r"`cu_seqlens` must hold offsets that grow from 0 .* build"
        ),
        sequences(cu_seqlens=offsets),
    ):
        pass
