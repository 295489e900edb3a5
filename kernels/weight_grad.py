"""The weight gradients of m objectives and their Gram matrix, in about one matrix product.

    G_i = Σ_n A_in dY_nᵀ X_n,    M_ij = ⟨G_i, G_j⟩

X [T, d_in] are a Linear layer's inputs and dY [T, d_out] the gradients of its outputs, their rows
in segments, one per sequence; A_in = ∂L_i/∂ℓ_n. Scaling the rows of dY and multiplying m times
costs m products, here the tensor cores run once:

- direct: t = dY_nᵀ X_n in an accumulator, and at the end of segment n, sum_i += A_in t in registers
  (m + 1 tiles). For any coefficients.
- running: the backward pass was seeded with A_0n, not 1. Then the accumulator is G_0 itself and is
  never reset, and sum_i += (r_in - r_i,n+1) accumulator wherever the ratios r = A_i / A_0 change
  (m tiles, fewer folds). `weight_grad_blocks.py` has the derivation, the order of segments that
  keeps it exact, and the tables of k-blocks that both loops run over.

Bytes: X and dY are read d_out / BLOCK_M and d_in / BLOCK_N times, mostly from L2 (tiles run in
groups for that); each G_i is written once, and read once where it is accumulated into. The Gram
needs no pass over memory: each tile leaves the m(m+1)/2 sums of its products, taken after rounding
to what was stored, and `gram_total` adds them in float64 in a fixed order. No float atomics, one
program per tile: equal inputs give equal bits for a given tiling, which is therefore never tuned.

Arithmetic is float32 on the tensor cores and in the folds. More than 8 objectives do not fit the
registers: blocks of them are launched one after the other, and the Gram is then a pass over the
stored gradients. float32 inputs are not taken: the product would not run on tensor cores.

Why this design:
- dY's tile is loaded as [BLOCK_M, BLOCK_K] through transposed addresses. `tl.trans` of a loaded
  tile keeps its loads out of the asynchronous copies on sm_80.
- Coefficients are loaded at the top of a k-block, so that they are prefetched as the operands are.
- Columns outside a matrix wrap around instead of being masked; the hints on `% d` promise whole
  16-byte vectors only, which hold because Triton uses them only where d is a multiple of 16.
- Accumulating reads tiles while all sums are alive. In two halves this does not spill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gram import gram, gram_total
from .tables import architecture, current, upload
from .weight_grad_arguments import MAX_UNROLLED, Arguments
from .weight_grad_blocks import direct_blocks, running_blocks
from .weight_grad_plan import tiling

TOTAL = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _stored_products(gs, outs, row, column, d_out, d_in, M: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Store m tiles, if there is where, and return the m(m+1)/2 sums of their products."""
    inside = (row < d_out)[:, None] & (column < d_in)[None, :]
    at = row[:, None].to(tl.int64) * d_in + column[None, :]
    if outs is not None:
        stored = ()
        for i in tl.static_range(M):
            g = gs[i]
            if ACCUMULATE:
                g += tl.load(outs[i] + at, mask=inside, other=0.0).to(tl.float32)
            g = g.to(outs[i].dtype.element_ty)
            tl.store(outs[i] + at, g, mask=inside)
            stored = stored + (g.to(tl.float32),)
        gs = stored
    products = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i, M):
            products = products + (tl.sum(tl.where(inside, gs[i] * gs[j], 0.0)),)
    return products


@triton.jit(do_not_specialize=["n_blocks", "n_columns"])
def weight_grad_tiles(
    x,
    dy,
    blocks,
    n_blocks,
    weights,
    n_columns,
    outs,
    partials,
    d_out,
    d_in,
    M: tl.constexpr,
    RUNNING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the m gradients `outs` (none: only their Gram), and row `tile` of `partials`."""
    PAIRS: tl.constexpr = M * (M + 1) // 2
    SUMS: tl.constexpr = M - 1 if RUNNING else M
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
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for b in tl.range(0, n_blocks, num_stages=STAGES):
        entry = tl.load(blocks + b)
        token = (entry & 0xFFFFFFFF) + k
        valid = k < ((entry >> 32) & 0xFF).to(tl.int32)
        ws = ()
        for i in tl.static_range(SUMS):
            ws = ws + (tl.load(weights + i * n_columns + (entry >> 41)),)
        ys = tl.load(dy + token[None, :] * d_out + y_at, mask=valid[None, :], other=0.0)
        xs = tl.load(x + token[:, None] * d_in + x_at, mask=valid[:, None], other=0.0)
        t = tl.dot(ys, xs, t)
        if (entry >> 40) & 1 != 0:
            folded = ()
            for i in tl.static_range(SUMS):
                folded = folded + (sums[i] + ws[i] * t,)
            sums = folded
            if not RUNNING:
                t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if RUNNING:
        sums = (t,) + sums
    if ACCUMULATE:
        left = ()
        right = ()
        for i in tl.static_range(M):
            a, b = _halves(sums[i], BLOCK_M, BLOCK_N)
            left = left + (a,)
            right = right + (b,)
        half = first_column + tl.arange(0, BLOCK_N // 2)
        of_left = _stored_products(left, outs, row, half, d_out, d_in, M, True)
        half += BLOCK_N // 2
        of_right = _stored_products(right, outs, row, half, d_out, d_in, M, True)
        for q in tl.static_range(PAIRS):
            tl.store(partials + tile * PAIRS + q, of_left[q] + of_right[q])
    else:
        products = _stored_products(sums, outs, row, column, d_out, d_in, M, False)
        for q in tl.static_range(PAIRS):
            tl.store(partials + tile * PAIRS + q, products[q])


def weight_grad(
    x: Tensor,
    dy: Tensor,
    segments: Sequence[int],
    coefficients: Tensor,
    out: Sequence[Tensor] | None = None,
    accumulate: bool = False,
    *,
    form: str = "direct",
) -> Tensor:
    """Write the weight gradients G_i = Σ_n A_in dY_nᵀ X_n and return their Gram matrix.

    Args:
        x: [T, d_in] bfloat16 or float16, contiguous.
        dy: [T, d_out] of the same dtype, contiguous. For the form "running", of a backward pass
            that was seeded with A_0 where the coefficients are A_i / A_0.
        segments: S + 1 offsets on the host, from 0 to T: segment n is the rows
            segments[n]:segments[n + 1]; it may be empty.
        coefficients: [m, S] float32 on the device, or on the CPU, from where they are sent. The
            form "running" orders segments by their values, so it takes them on the CPU only, as
            `segments.running_ratios` returns them.
        out: m contiguous tensors [d_out, d_in] of one dtype, bfloat16, float16 or float32, that do
            not overlap; None for the Gram alone.
        accumulate: add to what `out` holds, in float32, before it is rounded.
        form: "direct" or "running"; `weight_grad_plan.choose` says which.
    Returns:
        [m, m] float64 on the device, exactly symmetric: of what `out` then holds (so of the
        accumulated gradients where `accumulate`), or of the float32 G_i where out is None. For
        m > 8 it is a pass over `out` of its own. Nothing waits for the device.
    Raises:
        ValueError: arguments that break these rules, or more than 8 objectives without `out`.
    Source: arXiv 2602.02495, Algorithm 1, line 5, for the Gram.
    """
    arguments = Arguments(x, dy, segments, coefficients, out, accumulate, form)
    arguments.check()
    m = len(coefficients)
    with current(x.device):
        if m > MAX_UNROLLED:
            assert out is not None
            _launch_blocks(arguments, out)
            return gram([[g] for g in out], x.device)
        partials = _launch(arguments)
        total = torch.empty(m, m, dtype=torch.float64, device=x.device)
        gram_total[(1,)](partials, len(partials), total, M=m, **TOTAL)
        return total


def store_weight_grad(
    x: Tensor,
    dy: Tensor,
    segments: Sequence[int],
    coefficients: Tensor,
    out: Sequence[Tensor],
    accumulate: bool = False,
    *,
    form: str = "direct",
) -> None:
    """`weight_grad` without the Gram matrix: a launch for every 8 objectives, and nothing else."""
    arguments = Arguments(x, dy, segments, coefficients, out, accumulate, form)
    arguments.check()
    with current(x.device):
        _launch_blocks(arguments, out)


def _launch_blocks(arguments: Arguments, out: Sequence[Tensor]) -> None:
    """A launch for every 8 objectives."""
    m = len(out)
    count = -(-m // MAX_UNROLLED)
    for first, stop in pairwise(m * b // count for b in range(count + 1)):
        # Ratios are coefficients for seeded rows, so the other blocks can be direct.
        form = arguments.form if first == 0 else "direct"
        block = arguments.coefficients[first:stop]
        _launch(replace(arguments, coefficients=block, out=out[first:stop], form=form))


def _launch(arguments: Arguments) -> Tensor:
    """Partial sums of the Gram, [tiles, m(m+1)/2] float32."""
    x, dy, out, form = arguments.x, arguments.dy, arguments.out, arguments.form
    m, d_out, d_in = len(arguments.coefficients), dy.shape[1], x.shape[1]
    float32 = out is not None and out[0].dtype == torch.float32
    chosen = tiling(form, m, architecture(x.device), float32)
    table, weights = _loop(arguments, chosen.BLOCK_K)
    tiles = -(-d_out // chosen.BLOCK_M) * -(-d_in // chosen.BLOCK_N)
    partials = torch.empty(tiles, m * (m + 1) // 2, dtype=torch.float32, device=x.device)
    weight_grad_tiles[(tiles,)](
        x,
        dy,
        table,
        len(table),
        weights,
        weights.shape[1],
        None if out is None else tuple(out),
        partials,
        d_out,
        d_in,
        **constants(form, m, arguments.accumulate),
        **asdict(chosen),
    )
    return partials


def _loop(arguments: Arguments, block_k: int) -> tuple[Tensor, Tensor]:
    """The table of k-blocks and the weights of the folds, on the device."""
    device, segments = arguments.x.device, tuple(arguments.segments)
    weights = arguments.coefficients.contiguous()
    if arguments.form == "running":
        blocks, steps = running_blocks(segments, weights.numpy().tobytes(), block_k)
        return upload(blocks, device), upload(steps, device)
    if weights.device != device:
        weights = upload(weights.numpy(), device)
    return upload(direct_blocks(segments, block_k), device), weights


def constants(form: str, m: int, accumulate: bool) -> dict[str, object]:
    """What `weight_grad_tiles` is specialized on, beside its tiling."""
    return {"M": m, "RUNNING": form == "running", "ACCUMULATE": accumulate, "GROUP": 8}
