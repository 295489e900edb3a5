"""Tables of k-blocks, ratios and the choice of a form for the weight-gradient kernel: host code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast.kernels import weight_grad_plan as plan
from raco_fast.kernels.weight_grad_blocks import (
    _blocks,
    direct_blocks,
    running_blocks,
    running_ratios,
)

SEGMENTS = (0, 33, 33, 34, 98, 130)
LENGTHS = (33, 0, 1, 64, 32)


def unpacked(blocks: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(first row, valid rows, fold, column) of each block."""
    assert blocks.dtype == np.int64
    return [(b & 0xFFFFFFFF, (b >> 32) & 0xFF, (b >> 40) & 1, b >> 41) for b in blocks.tolist()]


def running(segments, ratios) -> tuple[list[tuple[int, int, int, int]], np.ndarray]:
    given = np.array(ratios, dtype=np.float32)
    blocks, steps = running_blocks(tuple(segments), given.tobytes(), 32)
    assert steps.dtype == np.float32
    return unpacked(blocks), steps


def replayed(blocks, steps, terms: Tensor) -> Tensor:
    """What the running form computes from one number per row, in float64."""
    t, sums = 0.0, np.zeros(len(steps))
    for row, valid, fold, column in blocks:
        t += float(terms[row : row + valid].sum())
        sums += fold * steps[:, column] * t
    return torch.tensor([t, *sums])


def test_direct_blocks():
    assert unpacked(direct_blocks(SEGMENTS, 32)) == [
        (0, 32, 0, 0), (32, 1, 1, 0), (33, 1, 1, 2), (34, 32, 0, 3), (66, 32, 1, 3), (98, 32, 1, 4),
    ]  # fmt: skip


def test_blocks_reach_to_2_to_the_32_rows():
    bounds = np.array([2**32 - 70, 2**32 - 5])
    blocks = _blocks(bounds[:1], bounds[1:], np.ones(1, dtype=np.int64), 64)
    assert unpacked(blocks) == [(2**32 - 70, 64, 0, 0), (2**32 - 6, 1, 1, 0)]


def test_tables_of_no_rows_are_empty():
    assert len(direct_blocks((0, 0, 0), 64)) == 0
    blocks, steps = running((0, 0, 0), [[1, 1], [2, 3]])
    assert blocks == []
    assert steps.shape == (1, 0)


def test_running_order_is_by_falling_ratio_and_folds_where_it_changes():
    blocks, steps = running(SEGMENTS, [[1, 1, 1, 1, 1], [2, 9, -5, 2, 0]])
    # Segment 1 is empty; 0 and 3 have one ratio but are no neighbours in memory: no fold between.
    assert blocks == [
        (33, 1, 1, 0), (0, 32, 0, 1), (32, 1, 0, 1), (34, 32, 0, 2), (66, 32, 1, 2), (98, 32, 0, 3),
    ]  # fmt: skip
    assert steps.tolist() == [[-7, 0, 2, 0]]


def test_neighbours_with_equal_ratios_share_their_blocks():
    blocks, steps = running((0, 20, 40, 50), [[1, 1, 1], [-1, -1, -1]])
    assert blocks == [(0, 32, 0, 0), (32, 18, 1, 0)]
    assert steps.tolist() == [[-1]]


@pytest.mark.parametrize("m", [1, 2, 3, 8])
@pytest.mark.parametrize("labels", [True, False])
def test_replaying_the_running_table_gives_the_weighted_sums(m, labels):
    generator = torch.Generator().manual_seed(m)
    lengths = torch.randint(0, 70, (24,), generator=generator)
    segments = [0, *lengths.cumsum(0).tolist()]
    A = torch.randn(m, 24, generator=generator, dtype=torch.float64)
    A = A.sign() if labels else A
    ratios = running_ratios(A)
    assert ratios is not None
    assert (ratios[0] == 1).all()
    terms = torch.randn(segments[-1], generator=generator, dtype=torch.float64)
    seeded = terms * A[0].repeat_interleave(lengths)
    blocks, steps = running(segments, ratios.numpy())
    rows = sorted(r for row, valid, _, _ in blocks for r in range(row, row + valid))
    assert rows == list(range(segments[-1]))
    truth = A.repeat_interleave(lengths, dim=1) @ terms
    scale = A.abs().repeat_interleave(lengths, dim=1) @ terms.abs()
    assert ((replayed(blocks, steps, seeded) - truth).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize(
    "A",
    [
        [[1, 0], [1, 1]],  # nothing seeds sequence 1
        [[1, 1e-300], [1, 1e10]],  # a ratio beyond float32
        [[1, float("nan")], [1, 1]],
        [[1, 1], [1, float("inf")]],
        # Objective 1 wants sequence 0 first, and G_2 is then the small rest of t_0 - t_0.
        [[1, 1e-4], [2, 1e-4], [0, 1e-4]],
    ],
)
def test_no_ratios_where_the_running_form_is_undefined_or_inexact(A):
    assert running_ratios(torch.tensor(A, dtype=torch.float64)) is None


def test_ratios_where_it_is_exact():
    found = running_ratios(torch.tensor([[1, 1e-4], [0, 1e-4]], dtype=torch.float64))
    assert found is not None
    assert found.tolist() == [[1, 1], [0, 1]]
    silent = running_ratios(torch.tensor([[2.0, -4.0], [0.0, 0.0]]))
    assert silent is not None
    assert silent.tolist() == [[1, 1], [0, 0]]


# KERNELS.md, section 3: a 4096 x 14336 layer, in units of the plain product.
MODEL = {
    (4096, 8): {2: (1.54, 1.51, 2.09), 3: (2.23, 1.59, 3.18), 4: (2.31, 2.29, 4.27)},
    (8192, 16): {2: (1.47, 1.45, 2.09), 3: (2.12, 1.50, 3.18), 4: (2.17, 2.15, 4.27)},
    (16384, 32): {2: (1.44, 1.41, 2.09), 3: (2.06, 1.45, 3.18), 4: (2.10, 2.07, 4.27)},
    (16384, 8): {2: (1.30, 1.29, 2.09), 3: (1.84, 1.31, 3.18), 4: (1.86, 1.85, 4.27)},
}


@pytest.mark.parametrize(
    ("T", "S", "m", "expected"),
    [(*shape, m, units) for shape, of_m in MODEL.items() for m, units in of_m.items()],
)
def test_the_model_is_the_one_of_the_study(T, S, m, expected):
    unit = plan.rows_seconds(T, 1, 4096, 14336, seeded=True)
    found = [plan.kernel_seconds(form, T, S, m, 4096, 14336) for form in ("direct", "running")]
    found.append(plan.rows_seconds(T, m, 4096, 14336, seeded=True))
    assert [f / unit for f in found] == pytest.approx(expected, abs=0.02)
    assert plan.choose(T, S, m, 4096, 14336, seeded=True) == "running"
    assert plan.choose(T, S, m, 4096, 14336) == "direct"


@pytest.mark.parametrize(("m", "break_even"), [(2, 120), (3, 120), (4, 72), (8, 56)])
def test_short_segments_are_for_scaled_rows(m, break_even):
    for length, expected in ((0.85 * break_even, "rows"), (1.2 * break_even, "direct")):
        assert plan.choose(8192, round(8192 / length), m, 4096, 14336) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096, 8, 1, 4096, 4096), "rows"),  # one product is one product
        ((4096, 8, 2, 4096, 50257), "rows"),  # rows that are no multiple of 16
        ((4096, 8, 16, 4096, 4096), "direct"),
        ((4096, 4096, 2, 4096, 4096), "rows"),  # a coefficient per token
    ],
)
def test_choices(arguments, expected):
    assert plan.choose(*arguments) == expected


def test_gram_alone_saves_the_stores_of_the_kernel_only():
    arguments = ("direct", 512, 4, 4, 4096, 4096)
    saved = plan.kernel_seconds(*arguments) - plan.kernel_seconds(*arguments, stored=False)
    assert saved == pytest.approx(2 * 4 * 4096**2 / plan.BANDWIDTH)


@pytest.mark.parametrize(("card", "like"), [(86, 80), (89, 80), (103, 100), (120, 80)])
def test_cards_without_tilings_of_their_own(card, like):
    assert plan.tiling("direct", 2, card, False) == plan.tiling("direct", 2, like, False)


@pytest.mark.parametrize("form", ["direct", "running"])
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("float32", [False, True])
def test_tiles_shrink_as_objectives_are_added(form, architecture, float32):
    tilings = [plan.tiling(form, m, architecture, float32) for m in range(1, 9)]
    sizes = [t.BLOCK_M * t.BLOCK_N for t in tilings]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 128 * 128
    assert sizes[-1] <= 64 * 64
