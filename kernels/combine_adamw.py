"""One AdamW step along G0 = Σ α_i g_i in one pass over memory.

    g = Σ α_i g_i                                                   arXiv 2602.02495, Algorithm 1
    m <- m + (1 - β1)(g - m)             v <- v + (1 - β2)(g² - v)
    w <- w - (lr wd w + lr/(1 - β1^t) m / (√v / √(1 - β2^t) + ε))   decoupled AdamW

Bytes per element, each element read once and written once (m = 2):

    gradients and weights bf16, states bf16 / fp32       16 / 24
    the same with split master weights                   20 / 28
    all fp32                                             32

The rival forms G0 in memory, then reads it for its norm, for clipping and for AdamW: 54 at m = 2
with bf16 states. Here ‖G0‖ is known from the Gram matrix, so clipping is a factor in α.

Why this design:
- Everything that changes from step to step lies in device memory: α, and a row of `HYPER` numbers
  per tensor, made from lr and the step count in float64 (1 - 0.999 in float32 is off by 3e-5). A
  schedule survives CUDA-graph capture, and a step whose α is not finite writes nothing, so no host
  has to look.
- Persistent grid, one launch; in place, hence never autotuned (the tuner would step many times).
- All addresses and numbers of a tensor are loaded before the inner loop: its stores forbid the
  compiler to move those loads out by itself.
- columns.py describes the accesses, rounding.py how a float32 weight is kept in bfloat16 memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .columns import (
    DTYPES,
    NUM_WARPS,
    bounds,
    gradients,
    pointers,
    shape_constants,
    weighted_sum,
)
from .rounding import opened, random_keys, store_rounded
from .tables import TensorTable, architecture, current, programs

HYPER = (
    "step_size",
    "decay",
    "one_minus_beta1",
    "one_minus_beta2",
    "root_bias",
    "eps",
    "sign",
    "step",
)
"""Columns of `hyper`: lr/(1-β1^t), lr·wd, 1-β1, 1-β2, 1/√(1-β2^t), ε, -1 to maximize else 1, t."""

# Resident programs per multiprocessor, from the register counts of the compiled kernels.
PROGRAMS = {"nearest": 9, "stochastic": 7, "split": 10}
PROGRAMS_SM_100 = {**PROGRAMS, "stochastic": 6}
PROGRAMS_OF_ROWS = 5


def resident_programs(rounding: str, architecture: int, rows: bool = False) -> int:
    """Programs of `combine_adamw_step` per multiprocessor of sm_XY."""
    if rows:
        return PROGRAMS_OF_ROWS
    return (PROGRAMS_SM_100 if architecture >= 100 else PROGRAMS)[rounding]


@triton.jit
def _update(
    gs,
    p,
    states,
    residuals,
    alphas,
    hyper,
    at,
    ends,
    n,
    keys,
    M: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
):
    """AdamW at the offsets `at` < n."""
    mask = at < n
    # Every load before any arithmetic, so that as many as possible are in flight together.
    loaded = gradients(gs, at, ends, M)
    w = tl.load(p + at, mask=mask, other=0.0)
    m = tl.load(states[0] + at, mask=mask, other=0.0)
    v = tl.load(states[1] + at, mask=mask, other=0.0)
    low = w
    residual = p
    if ROUNDING == "split":
        residual = residuals[0]
        low = tl.load(residual + at, mask=mask, other=0)
    # In float32: the moments, then the weight that memory stands for.
    g = hyper[6] * weighted_sum(loaded, alphas, M)
    m = m.to(tl.float32)
    v = v.to(tl.float32)
    w = opened(w, low, ROUNDING)
    m = m + hyper[2] * (g - m)
    v = v + hyper[3] * (g * g - v)
    w = w - (hyper[1] * w + hyper[0] * (m / (tl.sqrt(v) * hyper[4] + hyper[5])))
    store_rounded(w, p, residual, at, mask, keys, ROUNDING, ROWS)
    tl.store(states[0] + at, m.to(states[0].dtype.element_ty), mask=mask)
    tl.store(states[1] + at, v.to(states[1].dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["n_chunks"],
    do_not_specialize_on_alignment=["hyper", "alpha", "seed", "places"],
)
def combine_adamw_step(
    addresses,
    numels,
    ids,
    chunks,
    n_chunks,
    hyper,
    alpha,
    seed,
    places,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    MISSING: tl.constexpr,
):
    """AdamW for all tensors of a table; columns: M gradients, weight, two states, residual."""
    RESIDUALS: tl.constexpr = 1 if ROUNDING == "split" else 0
    COLUMNS: tl.constexpr = M + 3 + RESIDUALS
    # The coefficients, shared by all tensors. If one is not finite, there are no chunks to work on.
    alphas = ()
    zero = 0.0
    for i in tl.static_range(M):
        alphas = alphas + (tl.load(alpha + i),)
        zero += alphas[i] * 0.0  # NaN if α_i is not finite
    runs = zero == 0.0
    block = tl.arange(0, BLOCK)
    column = tl.arange(0, VEC)
    for c in tl.range(tl.program_id(0), tl.where(runs, n_chunks, 0), tl.num_programs(0)):
        # Which tensor, from which element on; its numbers and its pointers.
        entry = tl.load(chunks + c)
        tensor = entry >> 32
        start = (entry & 0xFFFFFFFF) * CHUNK
        n = tl.load(numels + tensor)
        number = tl.load(ids + tensor)
        h = ()
        for i in tl.static_range(7):
            h = h + (tl.load(hyper + number * 8 + i),)
        row = addresses + tensor * COLUMNS
        gs = pointers(row, start, M, GRAD, ALIGN)
        p = pointers(row + M, start, 1, PARAM, ALIGN)[0]
        states = pointers(row + M + 1, start, 2, STATE, ALIGN)
        residuals = pointers(row + M + 3, start, RESIDUALS, RESIDUAL, ALIGN)
        keys = ()
        if ROUNDING == "stochastic":
            t = tl.load(hyper + number * 8 + 7)
            keys = random_keys(tl.load(seed), t, places + number * 4, start, CHUNK, ROWS)
        # Whole vectors of VEC elements, block by block; then what is left of the tensor.
        whole = (n // VEC) * VEC
        left = tl.minimum(whole - start, CHUNK).to(tl.int32)
        lefts = bounds(row, left, M, MISSING)
        for k in tl.range(0, left, BLOCK):
            at = k + block
            _update(gs, p, states, residuals, alphas, h, at, lefts, left, keys, M, ROUNDING, ROWS)
        if (whole < n) & (start + CHUNK >= n):
            end = left + (n - whole).to(tl.int32)
            ends = bounds(row, end, M, MISSING)
            at = left + column
            _update(gs, p, states, residuals, alphas, h, at, ends, end, keys, M, ROUNDING, ROWS)


def combine_adamw(
    tables: Sequence[TensorTable],
    m: int,
    hyper: Tensor,
    alpha: Tensor,
    seed: Tensor,
    rounding: str = "nearest",
    places: Tensor | None = None,
    rows: bool = False,
) -> None:
    """One AdamW step along G0; weights, states and residuals change in place.

    Args:
        tables: of `build([*grads, params, exp_avgs, exp_avg_sqs, *residuals], m, device)`, with
            m <= 32 lists of gradients. Weights are bfloat16 unless rounding is "nearest", residuals
            are int16, for "split" only. Tensors without any gradient are left alone.
        m: the number of objectives.
        hyper: [n, 8] float32 on the device, columns `HYPER`, a row for each of the n tensors.
        alpha: [m] float32 on the device: the coefficients, unscaling and clipping folded in. If
            one is not finite, nothing is written.
        seed: [1] int64 on the device, of stochastic rounding, another one for every call of one
            step (parameter groups). The random bits change from step to step by themselves: with
            the step count in `hyper`.
        rounding: "nearest", "stochastic" or "split"; see rounding.py.
        places: [n, 4] int64 on the device, for stochastic rounding only: each tensor's number and
            where in the whole tensor it lies, as (offset, width, pitch). Element e has number
            offset + (e // width) * pitch + e % width, or offset + e where the width is 0.
        rows: must be True if a width is not 0, or if elements whose offset is not 0 have numbers
            on both sides of a multiple of 2^32.
    """
    device = hyper.device
    for table in tables:
        resident = resident_programs(rounding, architecture(device), rows)
        grid = min(programs(device, resident), len(table.chunks))
        with current(device):
            combine_adamw_step[(grid,)](
                table.addresses,
                table.numels,
                table.ids,
                table.chunks,
                len(table.chunks),
                hyper,
                alpha,
                seed,
                places,
                **step_constants(m, table, rounding, rows),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


def step_constants(
    m: int, table: TensorTable, rounding: str, rows: bool = False
) -> dict[str, object]:
    """What `combine_adamw_step` is specialized on."""
    return {
        "M": m,
        "GRAD": DTYPES[table.dtypes[0]],
        "PARAM": DTYPES[table.dtypes[m]],
        "STATE": DTYPES[table.dtypes[m + 1]],
        "RESIDUAL": DTYPES[table.dtypes[-1]],
        "ROUNDING": rounding,
        "ROWS": rows,
        **shape_constants(table),
    }
