"""The table of k-blocks and the cost model of the weight-gradient kernel: host code."""

from __future__ import annotations

import numpy as np
import pytest

from raco_fast.kernels import weight_grad_plan as plan

SEGMENTS = (0, 33, 33, 34, 98, 130)


def unpacked(segments: tuple[int, ...], block_k: int) -> list[tuple[int, int, int, int]]:
    """(first row, valid rows, last of its segment, segment) of each block."""
    kernels = pytest.importorskip("raco_fast.kernels.weight_grad", exc_type=ImportError)
    blocks = kernels.segment_blocks(segments, block_k)
    assert blocks.dtype == np.int64
    return [(b & 0xFFFFFFFF, (b >> 32) & 0xFF, (b >> 40) & 1, b >> 41) for b in blocks.tolist()]


def test_blocks_do_not_mix_segments():
    assert unpacked(SEGMENTS, 32) == [
        (0, 32, 0, 0), (32, 1, 1, 0), (33, 1, 1, 2), (34, 32, 0, 3), (66, 32, 1, 3), (98, 32, 1, 4),
    ]  # fmt: skip


def test_blocks_reach_to_2_to_the_32_rows():
    assert unpacked((2**32 - 70, 2**32 - 5), 64) == [(2**32 - 70, 64, 0, 0), (2**32 - 6, 1, 1, 0)]


def test_tables_of_no_rows_are_empty():
    assert unpacked((0, 0, 0), 64) == []


# A 4096 x 14336 layer, in units of a plain product of rows that need no scaling.
MODEL = {
    (4096, 8): {2: (1.54, 2.18), 3: (2.23, 3.27), 4: (2.31, 4.36)},
    (8192, 16): {2: (1.47, 2.18), 3: (2.12, 3.27), 4: (2.17, 4.36)},
    (16384, 32): {2: (1.44, 2.18), 3: (2.06, 3.27), 4: (2.10, 4.36)},
    (16384, 8): {2: (1.30, 2.18), 3: (1.84, 3.27), 4: (1.86, 4.36)},
}


@pytest.mark.parametrize(
    ("T", "S", "m", "expected"),
    [(*shape, m, units) for shape, of_m in MODEL.items() for m, units in of_m.items()],
)
def test_pinned_costs(T, S, m, expected):
    unit = 2 * T * 4096 * 14336 / plan.PLAIN_FLOPS
    found = (plan.kernel_seconds(T, S, m, 4096, 14336), plan.plain_seconds(T, m, 4096, 14336))
    assert [f / unit for f in found] == pytest.approx(expected, abs=0.02)
    assert plan.pays(T, S, m, 4096, 14336)


@pytest.mark.parametrize(("m", "break_even"), [(2, 120), (3, 120), (4, 72), (8, 56)])
def test_short_segments_are_for_scaled_rows(m, break_even):
    for length, expected in ((0.85 * break_even, False), (1.2 * break_even, True)):
        assert plan.pays(8192, round(8192 / length), m, 4096, 14336) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096, 8, 1, 4096, 4096), False),  # one product is one product
        ((4096, 8, 2, 4096, 50257), False),  # rows that are no multiple of 16
        ((4096, 8, 16, 4096, 4096), True),
        ((4096, 4096, 2, 4096, 4096), False),  # a coefficient per token
    ],
)
def test_choices(arguments, expected):
    assert plan.pays(*arguments) == expected


@pytest.mark.parametrize(("card", "like"), [(86, 80), (89, 80), (103, 100), (120, 80)])
def test_cards_without_tilings_of_their_own(card, like):
    assert plan.tiling(2, card, False) == plan.tiling(2, like, False)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("float32", [False, True])
def test_tiles_shrink_as_objectives_are_added(architecture, float32):
    tilings = [plan.tiling(m, architecture, float32) for m in range(1, 9)]
    sizes = [t.BLOCK_M * t.BLOCK_N for t in tilings]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 128 * 128
    assert sizes[-1] <= 64 * 64
