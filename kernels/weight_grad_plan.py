"""How the weight gradients of a layer are computed: the form, and the tile of a program.

Forms are compared by a model, not by measurements: **nothing here has been timed on a GPU**. It is
that of an H200, where the plain product of a weight gradient is taken to run at 790 TFLOP/s and to
be one unit:

- A k-block costs what it moves through shared memory (128 bytes a clock): its operands are written
  once and read by two warp groups. Triton is taken to reach 82 % of that.
- A fold costs one multiply-add per element and sum (128 a clock) and a drained pipeline.
- "rows" are m plain products, all but a seeded one of rows that were scaled in a pass over dY.

The model gives the H200's forms for every GPU; the ratios, which are all that matters here, depend
on the balance of tensor cores and shared memory. Measure before believing a difference of 10 %.
"""

from __future__ import annotations

from dataclasses import dataclass


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
# Largest m without spills in each of the first three tiles. By form, architecture and whether the
# outputs are float32. Read off compiled code, not timed.
LARGEST_M = {
    ("direct", 80, False): (2, 5, 8),
    ("direct", 80, True): (2, 5, 8),
    ("direct", 90, False): (2, 5, 8),
    ("direct", 90, True): (2, 5, 8),
    ("direct", 100, False): (2, 4, 8),
    ("direct", 100, True): (2, 3, 6),
    ("running", 80, False): (2, 5, 8),
    ("running", 80, True): (2, 5, 8),
    ("running", 90, False): (3, 5, 8),
    ("running", 90, True): (2, 5, 8),
    ("running", 100, False): (2, 5, 8),
    ("running", 100, True): (2, 4, 6),
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


def tiling(form: str, m: int, architecture: int, float32: bool) -> Tiling:
    """The largest tile whose sums stay in registers; a smaller one loads more per product.

    Args:
        form: "direct" or "running".
        m: objectives in one launch, at most 8.
        architecture: compute capability, as in sm_90. wgmma and tcgen05 are those of sm_90 and
            sm_100; all other cards get the tiles of mma.sync, which need little shared memory.
        float32: whether the outputs are.
    """
    family = 10 * (architecture // 10) if 90 <= architecture < 110 else 80
    smaller = sum(m > largest for largest in LARGEST_M[form, family, float32])
    block_m, block_n = TILES[smaller]
    block_k, stages = (32, 7) if family == 80 else (64, 5)
    return Tiling(block_m, block_n, block_k, stages)


def choose(
    T: int, S: int, m: int, d_in: int, d_out: int, *, seeded: bool = False, stored: bool = True
) -> str:
    """The cheapest way to the weight gradients of one Linear layer, by the model.

    Args:
        T: tokens, the rows of x and dy.
        S: segments with tokens.
        m: objectives.
        d_in: columns of x.
        d_out: columns of dy.
        seeded: the backward pass was seeded with A_0 where the coefficients are A_i / A_0, the
            condition of the running form (`segments.running_ratios`).
        stored: the gradients are written, not only their Gram; "rows" always writes them.
    Returns:
        "direct", "running" (only if seeded), or "rows": m products with row-scaled dY. Rows whose
        length is no multiple of 16 are for "rows": the kernel reads them element by element.
    """
    if d_in % 16 or d_out % 16:
        return "rows"
    forms = ("running", "direct") if seeded else ("direct",)
    costs = {form: kernel_seconds(form, T, S, m, d_in, d_out, stored) for form in forms}
    costs["rows"] = rows_seconds(T, m, d_in, d_out, seeded)
    return min(costs, key=lambda form: costs[form])


def kernel_seconds(
    form: str, T: int, S: int, m: int, d_in: int, d_out: int, stored: bool = True
) -> float:
    """Modelled time of `weight_grad` on an H200 with bfloat16 operands and results."""
    launches = -(-m // 8)
    per_launch = -(-m // launches)
    tile = tiling(form, per_launch, 90, False)
    rows, columns, depth = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K
    written = 2 * depth * (rows + columns)
    read = 2 * depth * (rows + 2 * columns) if rows == 128 else 2 * depth * (2 * rows + columns)
    block = (written + read) / SHARED_BYTES / SHARED_EFFICIENCY
    sums = per_launch - 1 if form == "running" else per_launch
    fold = sums * rows * columns / LANES + DRAIN
    # A ragged end wastes half a block per segment.
    clocks = (T / depth + S / 2) * block + S * fold + EPILOGUE
    tiles = -(-d_out // rows) * -(-d_in // columns)
    waves = max(1.0, tiles / MULTIPROCESSORS)
    stores = 2 * m * d_in * d_out / BANDWIDTH if stored else 0.0
    return launches * waves * clocks / CLOCK + stores


def rows_seconds(T: int, m: int, d_in: int, d_out: int, seeded: bool = False) -> float:
    """Modelled time of m plain products, with row-scaled copies of dY (read once, written once)."""
    moved = 2 * (T * (d_in + d_out) + d_in * d_out)
    product = max(2 * T * d_in * d_out / PLAIN_FLOPS, moved / BANDWIDTH)
    scaled = m - 1 if seeded else m
    return m * product + scaled * 4 * T * d_out / BANDWIDTH
