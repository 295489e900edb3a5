"""Which tile the weight-gradient kernel has, and for which layers it is worth while.

Kernel and plain products are compared by a model, not by measurements: **nothing here has been
timed on a GPU**. It is that of an H200, where the plain product of a weight gradient is taken to
run at 790 TFLOP/s:

- A k-block costs what it moves through shared memory (128 bytes a clock): its operands are written
  once and read by two warp groups. Triton is taken to reach 82 % of that.
- A fold costs one multiply-add per element and objective (128 a clock) and a drained pipeline.
- The rival is m plain products of rows that were scaled in a pass over dY.

Every GPU is treated as an H200; the ratios, which are all that matters here, depend on the balance
of tensor cores and shared memory. Measure before believing a difference of 10 %.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_UNROLLED = 8
"""Objectives whose sums fit the registers of one launch."""


@dataclass(frozen=True)
class Tiling:
    """A program's tile of the gradient, its k-block, and how it is compiled.

    A load through a table takes a stage of its own: 5 stages are 3 buffers of the operands.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    STAGES: int
    num_warps: int = 8


TILES = ((128, 128), (128, 64), (64, 64), (64, 32))
# Largest m without spills in each of the first three tiles, by architecture and whether the outputs
# are float32. Read off compiled code, not timed.
LARGEST_M = {
    (80, False): (2, 5, 8),
    (80, True): (2, 5, 8),
    (90, False): (2, 5, 8),
    (90, True): (2, 5, 8),
    (100, False): (2, 4, 8),
    (100, True): (2, 3, 6),
}

MULTIPROCESSORS = 132
CLOCK = 1.83e9  # Hz
PLAIN_FLOPS = 790e12  # per second, of cuBLAS
BANDWIDTH = 4.3e12  # bytes per second, of memory
SHARED_BYTES = 128  # per clock and multiprocessor
SHARED_EFFICIENCY = 0.82
LANES = 128  # float32 multiply-adds per clock and multiprocessor
DRAIN = 300  # clocks
EPILOGUE = 2000  # clocks per tile beside its stores


def tiling(m: int, architecture: int, float32: bool) -> Tiling:
    """The largest tile whose sums stay in registers; a smaller one loads more per product.

    Args:
        m: objectives in one launch, at most MAX_UNROLLED.
        architecture: compute capability, as in sm_90. wgmma and tcgen05 are those of sm_90 and
            sm_100; all other cards get the tiles of mma.sync, which need little shared memory.
        float32: whether the outputs are.
    """
    family = 10 * (architecture // 10) if 90 <= architecture < 110 else 80
    smaller = sum(m > largest for largest in LARGEST_M[family, float32])
    block_m, block_n = TILES[smaller]
    block_k, stages = (32, 7) if family == 80 else (64, 5)
    return Tiling(block_m, block_n, block_k, stages)


def pays(T: int, S: int, m: int, d_in: int, d_out: int) -> bool:
    """Whether the model prefers the kernel to m plain products for one Linear layer.

    Args:
        T: tokens, the rows of x and dy.
        S: segments with tokens.
        m: objectives.
        d_in: columns of x.
        d_out: columns of dy. Rows whose length is no multiple of 16 are for plain products: the
            kernel reads them element by element.
    """
    if d_in % 16 or d_out % 16:
        return False
    return kernel_seconds(T, S, m, d_in, d_out) <= plain_seconds(T, m, d_in, d_out)


def kernel_seconds(T: int, S: int, m: int, d_in: int, d_out: int) -> float:
    """Modelled time of the kernel on an H200 with bfloat16 operands and results."""
    launches = -(-m // MAX_UNROLLED)
    per_launch = -(-m // launches)
    tile = tiling(per_launch, 90, False)
    rows, columns, depth = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K
    written = 2 * depth * (rows + columns)
    read = 2 * depth * (rows + 2 * columns) if rows == 128 else 2 * depth * (2 * rows + columns)
    block = (written + read) / SHARED_BYTES / SHARED_EFFICIENCY
    fold = per_launch * rows * columns / LANES + DRAIN
    # A ragged end wastes half a block per segment.
    clocks = (T / depth + S / 2) * block + S * fold + EPILOGUE
    tiles = -(-d_out // rows) * -(-d_in // columns)
    waves = max(1.0, tiles / MULTIPROCESSORS)
    return launches * waves * clocks / CLOCK + 2 * m * d_in * d_out / BANDWIDTH


def plain_seconds(T: int, m: int, d_in: int, d_out: int) -> float:
    """Modelled time of m plain products, with row-scaled copies of dY (read once, written once)."""
    moved = 2 * (T * (d_in + d_out) + d_in * d_out)
    product = max(2 * T * d_in * d_out / PLAIN_FLOPS, moved / BANDWIDTH)
    return m * (product + 4 * T * d_out / BANDWIDTH)
