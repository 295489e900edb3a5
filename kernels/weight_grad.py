"""The weight gradients of m objectives of one Linear layer, in about one matrix product.

    G_i = Σ_n A_in dY_nᵀ X_n

X [T, d_in] are the layer's inputs and dY [T, d_out] the gradients of its outputs, their rows in
segments, one per sequence; A_in = ∂L_i/∂ℓ_n. Scaling the rows of dY and multiplying m times costs
m products. Here the tensor cores run once: t = dY_nᵀ X_n in an accumulator, and at the end of
segment n, sum_i += A_in t in registers (m + 1 tiles).

Bytes: X and dY are read d_out / BLOCK_M and d_in / BLOCK_N times, mostly from L2 (tiles run in
groups for that); each G_i is written once, and read once where it is accumulated into. One program
per tile and no float atomics: equal inputs give equal bits for a given tiling, which is therefore
never tuned.

The products ⟨G_i, G_j⟩, of which a step's Gram matrix is the sum, can be taken on the way, of what
has been written and while it is in registers: each tile leaves its share, m(m+1)/2 float32 numbers,
and their sum is float64. That spares the step a reading of the m gradients. Sums are in the order
of the tiles, not in that of `gram.py`: the two agree to rounding, not to the bit.

Arithmetic is float32 on the tensor cores and in the folds. More than 8 objectives do not fit the
registers: blocks of them are launched one after the other. float32 inputs are not taken: the
product would not run on tensor cores.

Why this design:
- One flat loop over a table of k-blocks (`segment_blocks`). It keeps its loads ahead of the
  arithmetic across the ends of segments, which nested loops do not.
- dY's tile is loaded as [BLOCK_M, BLOCK_K] through transposed addresses. `tl.trans` of a loaded
  tile keeps its loads out of the asynchronous copies on sm_80.
- Coefficients are loaded at the top of a k-block, so that they are prefetched as the operands are.
- Columns outside a matrix wrap around instead of being masked; the hints on `% d` promise whole
  16-byte vectors only, which hold because Triton uses them only where d is a multiple of 16.
- Accumulating reads tiles while all sums are alive. In two halves this does not spill; products are
  taken of each half, but of whole tiles where nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import architecture, current, upload
from .weight_grad_plan import MAX_UNROLLED, tiling


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store(gs, outs, row, column, d_out, d_in, M: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Write m tiles [len(row), len(column)] to the gradients, or add them.

    Returns what can be read there then, in float32, and which of it lies inside of the matrix.
    """
    inside = (row < d_out)[:, None] & (column < d_in)[None, :]
    at = row[:, None].to(tl.int64) * d_in + column[None, :]
    written = ()
    for i in tl.static_range(M):
        g = gs[i]
        if ACCUMULATE:
            g += tl.load(outs[i] + at, mask=inside, other=0.0).to(tl.float32)
        g = g.to(outs[i].dtype.element_ty)
        tl.store(outs[i] + at, g, mask=inside)
        written = written + (g.to(tl.float32),)
    return written, inside


@triton.jit
def _inner_products(gs, inside, M: tl.constexpr):
    """The sums of g_i g_j over a tile, i <= j."""
    found = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i, M):
            # Products are masked, not gradients: that would be m more tiles to hold.
            product = tl.where(inside, gs[i] * gs[j], 0.0)
            found = found + (tl.sum(tl.sum(product, axis=1), axis=0),)
    return found


@triton.jit(do_not_specialize=["n_blocks", "n_segments"])
def weight_grad_tiles(
    x,
    dy,
    blocks,
    n_blocks,
    coefficients,
    n_segments,
    outs,
    d_out,
    d_in,
    partials,
    M: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of the m gradients `outs`, each [d_out, d_in].

    PRODUCTS: and column `tile` of `partials` [M(M+1)/2, tiles] float32, the tile's share of
    ⟨g_i, g_j⟩, i <= j, of what `outs` hold then.
    """
    # Which tile: bands of GROUP tile rows, column by column, so that neighbours share operands.
    tile = tl.program_id(0)
    band = tile // (GROUP * tl.cdiv(d_in, BLOCK_N))
    in_band = tile % (GROUP * tl.cdiv(d_in, BLOCK_N))
    height = tl.minimum(tl.cdiv(d_out, BLOCK_M) - band * GROUP, GROUP)
    row = (band * GROUP + in_band % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = (in_band // height) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    y_at = tl.max_contiguous(tl.multiple_of(row % d_out, BLOCK_M), BLOCK_M)[:, None]
    x_at = tl.max_contiguous(tl.multiple_of(column % d_in, BLOCK_N), BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for b in tl.range(0, n_blocks, num_stages=STAGES):
        # The rows of this k-block, and the coefficients [m] of its segment.
        entry = tl.load(blocks + b)
        token = (entry & 0xFFFFFFFF) + k
        valid = k < ((entry >> 32) & 0xFF).to(tl.int32)
        ws = ()
        for i in tl.static_range(M):
            ws = ws + (tl.load(coefficients + i * n_segments + (entry >> 41)),)
        # t += dYᵀ X of these rows: [BLOCK_M, BLOCK_K] times [BLOCK_K, BLOCK_N].
        ys = tl.load(dy + token[None, :] * d_out + y_at, mask=valid[None, :], other=0.0)
        xs = tl.load(x + token[:, None] * d_in + x_at, mask=valid[:, None], other=0.0)
        t = tl.dot(ys, xs, t)
        # At the end of a segment its product goes into every sum.
        if (entry >> 40) & 1 != 0:
            folded = ()
            for i in tl.static_range(M):
                folded = folded + (sums[i] + ws[i] * t,)
            sums = folded
            t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ACCUMULATE:
        left = ()
        right = ()
        for i in tl.static_range(M):
            a, b = _halves(sums[i], BLOCK_M, BLOCK_N)
            left = left + (a,)
            right = right + (b,)
        half = first_column + tl.arange(0, BLOCK_N // 2)
        left, inside = _store(left, outs, row, half, d_out, d_in, M, True)
        products = ()
        if PRODUCTS:
            products = _inner_products(left, inside, M)
        right, inside = _store(right, outs, row, half + BLOCK_N // 2, d_out, d_in, M, True)
        if PRODUCTS:
            of_right = _inner_products(right, inside, M)
            for q in tl.static_range(M * (M + 1) // 2):
                tl.store(partials + q * tl.num_programs(0) + tile, products[q] + of_right[q])
    else:
        written, inside = _store(sums, outs, row, column, d_out, d_in, M, False)
        if PRODUCTS:
            products = _inner_products(written, inside, M)
            for q in tl.static_range(M * (M + 1) // 2):
                tl.store(partials + q * tl.num_programs(0) + tile, products[q])


def weight_grad(
    x: Tensor,
    dy: Tensor,
    segments: Sequence[int],
    coefficients: Tensor,
    out: Sequence[Tensor],
    accumulate: bool = False,
    products: bool = False,
) -> Tensor | None:
    """Write the weight gradients G_i = Σ_n A_in dY_nᵀ X_n: a launch for every 8 objectives.

    The caller has checked all of this; nothing waits for the device.

    Args:
        x: [T, d_in] bfloat16 or float16, contiguous.
        dy: [T, d_out] of the same dtype, contiguous.
        segments: S + 1 offsets on the host, from 0 to T: segment n is the rows
            segments[n]:segments[n + 1]; it may be empty.
        coefficients: [m, S] float32 on the device, or on the CPU, from where they are sent.
        out: m contiguous tensors [d_out, d_in] of one dtype, bfloat16, float16 or float32, that do
            not overlap.
        accumulate: add to what `out` holds, in float32, before it is rounded.
        products: whether to return the products of the gradients.
    Returns:
        With `products`, ⟨out_i, out_j⟩ of what `out` holds then: [m, m] float64 on the device,
        exactly symmetric. None for more than 8 objectives, which are not in registers together.
    """
    m, d_out, d_in, device = len(out), dy.shape[1], x.shape[1], x.device
    count = -(-m // MAX_UNROLLED)
    partials = None
    with current(device):
        for first, stop in pairwise(m * b // count for b in range(count + 1)):
            tile = tiling(stop - first, architecture(device), out[0].dtype == torch.float32)
            table = upload(segment_blocks(tuple(segments), tile.BLOCK_K), device)
            weights = coefficients[first:stop].contiguous()
            if weights.device != device:
                weights = upload(weights.numpy(), device)
            tiles = -(-d_out // tile.BLOCK_M) * -(-d_in // tile.BLOCK_N)
            if products and count == 1:
                shape = m * (m + 1) // 2, tiles
                partials = torch.empty(shape, dtype=torch.float32, device=device)
            weight_grad_tiles[(tiles,)](
                x,
                dy,
                table,
                len(table),
                weights,
                weights.shape[1],
                tuple(out[first:stop]),
                d_out,
                d_in,
                partials,
                **constants(stop - first, accumulate, partials is not None),
                **asdict(tile),
            )
        if partials is None:
            return None
        return partials.sum(1, dtype=torch.float64).take(upload(pair_table(m), device))


@lru_cache(maxsize=MAX_UNROLLED)
def pair_table(m: int) -> np.ndarray:
    """int64 [m, m]: which of the M(M+1)/2 pairs i <= j, row after row, each entry is."""
    table = np.zeros((m, m), dtype=np.int64)
    table[np.triu_indices(m)] = np.arange(m * (m + 1) // 2)
    symmetric: np.ndarray = np.maximum(table, table.T)
    return symmetric


def constants(m: int, accumulate: bool, products: bool) -> dict[str, object]:
    """What `weight_grad_tiles` is specialized on, beside its tiling."""
    return {"M": m, "ACCUMULATE": accumulate, "PRODUCTS": products, "GROUP": 8}


@lru_cache(maxsize=64)
def segment_blocks(segments: tuple[int, ...], block_k: int) -> np.ndarray:
    """The rows of segments as a table of k-blocks, the steps of the kernel's loop: int64 [n].

    A k-block is at most `block_k` rows of one segment, so none mixes sequences; an empty segment
    has none. It is kept by its content, as the layers of one model share it. An entry is

        first row | valid rows << 32 | last of its segment << 40 | segment << 41
    """
    bounds = np.array(segments, dtype=np.int64)
    counts = -(-np.diff(bounds) // block_k)
    segment = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    place = np.arange(len(segment), dtype=np.int64) - np.repeat(counts.cumsum() - counts, counts)
    row = bounds[segment] + place * block_k
    valid = np.minimum(bounds[segment + 1] - row, block_k)
    last = (place == counts[segment] - 1).astype(np.int64)
    entries: np.ndarray = row | valid << 32 | last << 40 | segment << 41
    return entries
