"""One AdamW step along G0 = Σ α_i g_i, and G0 alone, each in one pass over memory.

    g = (clip / grad_scale) Σ α_i g_i                               arXiv 2602.02495, Algorithm 1
    m <- m + (1 - β1)(g - m)             v <- v + (1 - β2)(g² - v)
    w <- w - (lr wd w + lr/(1 - β1^t) m / (√v / √(1 - β2^t) + ε))   decoupled AdamW

Bytes per element, each element read once and written once (m = 2):

    gradients and weights bf16, states bf16 / fp32       16 / 24
    the same with split master or Kahan residual         20 / 28
    all fp32                                             32

The rival forms G0 in memory, then reads it for its norm, for clipping and for AdamW: 54 at m = 2
with bf16 states. Here ‖G0‖ is known from the Gram matrix, so clipping is one factor.

Why this design:
- Everything that changes from step to step lies in device memory: α, clip factor, grad_scale,
  found_inf, seed, and one row of `HYPER` numbers per tensor, made from lr and the step count in
  float64 (1 - 0.999 in float32 would be off by 3e-5). A schedule survives CUDA-graph capture, and
  a step whose α is not finite, or whose found_inf is set, writes nothing: no host has to look.
- Persistent grid, one launch; in place, hence never autotuned (the tuner would step many times).
- All addresses and numbers of a tensor are loaded before the inner loop: its stores forbid the
  compiler to move those loads out by itself.
- 16 / (largest element size) elements per thread. With more, the stores of the wider tensors do not
  fit 16 bytes, and Triton exchanges data between threads through shared memory to make them fit.
- Mask bound rounded down to that number, scalar tail, int64 chunk starts, missing gradients with
  address 0: as in gram.py, for the same reasons.

Rounding of bfloat16 weights. At the learning rates of preference tuning most updates are smaller
than half a unit in the last place, and round-to-nearest drops them:
- "nearest"     the plain way.
- "stochastic"  up or down with the probability that makes it right on average. The 16 random bits
                are a hash of (element, tensor, seed), so they depend on neither grid nor chunks;
                56 instructions for 4 elements, a tenth of Philox. A new seed every step.
- "split"       weight and int16 residual are the two halves of a float32 master weight: exact, in
                4 bytes instead of 6. The halves are formed in integers, rounding half up; nearest
                even would leave +32768 on a tie, which int16 cannot hold.
- "kahan"       a bfloat16 residual carries what rounding lost into the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import TensorTable, build, current, programs

ROUNDINGS = ("nearest", "stochastic", "split", "kahan")
DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int16: tl.int16,
}
HYPER = ("step_size", "decay", "one_minus_beta1", "one_minus_beta2", "root_bias", "eps", "sign")
"""Columns of `hyper`: lr/(1-β1^t), lr·wd, 1-β1, 1-β2, 1/√(1-β2^t), ε, -1 to maximize else 1."""

NUM_WARPS = 4
# Resident programs per multiprocessor, from the register counts of the compiled kernels.
PROGRAMS = {"nearest": 10, "stochastic": 6, "split": 8, "kahan": 8}


@triton.jit
def _random_bits(element, key, second_key):
    """16 random bits in the low half of a uint32. Two keys: with one, the bits of two tensors would
    be the same sequence in another order.
    """
    x = element ^ key
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) + second_key
    x = x * 0x846CA68B
    return (x ^ (x >> 16)) & 0xFFFF


@triton.jit
def _key(seed, tensor, high):
    """uint32 from the seed, the tensor's id and the high half of the element's index."""
    x = seed ^ (tensor * 0x9E3779B1 + high * 0x85EBCA77).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _pointers(row, start, COUNT: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to element `start` of the tensors in COUNT columns of a row."""
    found = ()
    for i in tl.static_range(COUNT):
        pointer = tl.load(row + i).to(tl.pointer_type(TYPE))
        found = found + (tl.multiple_of(pointer, ALIGN) + start,)
    return found


@triton.jit
def _bounds(row, n, M: tl.constexpr, MISSING: tl.constexpr):
    """n for each gradient that exists, 0 for each that is missing."""
    found = ()
    for i in tl.static_range(M):
        if MISSING:
            found = found + (tl.where(tl.load(row + i) != 0, n, 0),)
        else:
            found = found + (n,)
    return found


@triton.jit
def _gradients(gs, at, bounds, M: tl.constexpr):
    """The M gradients at the offsets `at`, as loaded; zero behind a gradient's bound."""
    loaded = ()
    for i in tl.static_range(M):
        loaded = loaded + (tl.load(gs[i] + at, mask=at < bounds[i], other=0.0),)
    return loaded


@triton.jit
def _combined(loaded, alphas, M: tl.constexpr):
    """Σ α_i g_i in float32."""
    g = alphas[0] * loaded[0].to(tl.float32)
    for i in tl.static_range(1, M):
        g += alphas[i] * loaded[i].to(tl.float32)
    return g


@triton.jit
def _round_and_store(w, w_old, change, p, residual, low, at, mask, keys, ROUNDING: tl.constexpr):
    """Store the new weight `w` = `w_old` - `change`, and what its rounding leaves behind."""
    PARAM: tl.constexpr = p.dtype.element_ty
    if ROUNDING == "nearest":
        tl.store(p + at, w.to(PARAM), mask=mask)
    elif ROUNDING == "stochastic":
        noise = _random_bits(at.to(tl.uint32) + keys[2], keys[0], keys[1])
        bits = w.to(tl.uint32, bitcast=True)
        noise = tl.where(w == w, noise, 0)  # a device's NaN, 0x7FFFFFFF, would carry into -0
        half = ((bits + noise) >> 16).to(tl.uint16)
        tl.store(p + at, half.to(tl.bfloat16, bitcast=True), mask=mask)
    elif ROUNDING == "split":
        bits = w.to(tl.int32, bitcast=True)
        high = tl.where(w == w, (bits + 0x8000) >> 16, 0x7FC0)  # NaN stays NaN
        tl.store(residual + at, (bits - (high << 16)).to(tl.int16), mask=mask)
        tl.store(p + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.static_assert(ROUNDING == "kahan")
        rounded = (w_old + (low - change)).to(PARAM)
        lost = (low - change) - (rounded.to(tl.float32) - w_old)
        tl.store(residual + at, lost.to(PARAM), mask=mask)
        tl.store(p + at, rounded, mask=mask)


@triton.jit
def _update(
    gs,
    p,
    states,
    residuals,
    alphas,
    hyper,
    at,
    bounds,
    n,
    keys,
    M: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """AdamW at the offsets `at` < n."""
    mask = at < n
    # Every load before any arithmetic, so that as many as possible are in flight together.
    loaded = _gradients(gs, at, bounds, M)
    w = tl.load(p + at, mask=mask, other=0.0)
    m = tl.load(states[0] + at, mask=mask, other=0.0)
    v = tl.load(states[1] + at, mask=mask, other=0.0)
    low = w
    residual = p
    if ROUNDING == "split" or ROUNDING == "kahan":
        residual = residuals[0]
        low = tl.load(residual + at, mask=mask, other=0)
    g = hyper[6] * _combined(loaded, alphas, M)
    m = m.to(tl.float32)
    v = v.to(tl.float32)
    w = w.to(tl.float32)
    if ROUNDING == "split":
        w = (w.to(tl.int32, bitcast=True) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    if ROUNDING == "kahan":
        low = low.to(tl.float32)
    m = m + hyper[2] * (g - m)
    v = v + hyper[3] * (g * g - v)
    change = hyper[1] * w + hyper[0] * (m / (tl.sqrt(v) * hyper[4] + hyper[5]))
    _round_and_store(w - change, w, change, p, residual, low, at, mask, keys, ROUNDING)
    tl.store(states[0] + at, m.to(states[0].dtype.element_ty), mask=mask)
    tl.store(states[1] + at, v.to(states[1].dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["n_chunks"],
    do_not_specialize_on_alignment=["hyper", "alpha", "clip", "grad_scale", "found_inf", "seed"],
)
def combine_adamw_step(
    addresses,
    numels,
    ids,
    chunks,
    n_chunks,
    hyper,
    alpha,
    clip,
    grad_scale,
    found_inf,
    seed,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGN: tl.constexpr,
    MISSING: tl.constexpr,
):
    """AdamW for all tensors of a table; columns: M gradients, weight, two states, residual."""
    RESIDUALS: tl.constexpr = 1 if ROUNDING == "split" or ROUNDING == "kahan" else 0
    COLUMNS: tl.constexpr = M + 3 + RESIDUALS
    factor = tl.load(clip) / tl.load(grad_scale)
    alphas = ()
    zero = tl.load(found_inf)
    for i in tl.static_range(M):
        alphas = alphas + (tl.load(alpha + i) * factor,)
        zero += tl.abs(alphas[i] * 0.0)  # NaN if α_i is not finite
    runs = zero == 0.0
    block = tl.arange(0, BLOCK)
    column = tl.arange(0, VEC)
    for c in tl.range(tl.program_id(0), tl.where(runs, n_chunks, 0), tl.num_programs(0)):
        entry = tl.load(chunks + c)
        tensor = entry >> 32
        start = (entry & 0xFFFFFFFF) * CHUNK
        n = tl.load(numels + tensor)
        number = tl.load(ids + tensor)
        h = ()
        for i in tl.static_range(7):
            h = h + (tl.load(hyper + number * 7 + i),)
        row = addresses + tensor * COLUMNS
        gs = _pointers(row, start, M, GRAD, ALIGN)
        p = _pointers(row + M, start, 1, PARAM, ALIGN)[0]
        states = _pointers(row + M + 1, start, 2, STATE, ALIGN)
        residuals = _pointers(row + M + 3, start, RESIDUALS, RESIDUAL, ALIGN)
        keys = ()
        if ROUNDING == "stochastic":
            key = _key(tl.load(seed).to(tl.uint32), number, start >> 32)
            keys = (key, _key(key, number, start >> 32), start.to(tl.uint32))
        whole = (n // VEC) * VEC
        left = tl.minimum(whole - start, CHUNK).to(tl.int32)
        lefts = _bounds(row, left, M, MISSING)
        for k in tl.range(0, left, BLOCK):
            at = k + block
            _update(gs, p, states, residuals, alphas, h, at, lefts, left, keys, M, ROUNDING)
        if (whole < n) & (start + CHUNK >= n):
            end = left + (n - whole).to(tl.int32)
            ends = _bounds(row, end, M, MISSING)
            at = left + column
            _update(gs, p, states, residuals, alphas, h, at, ends, end, keys, M, ROUNDING)


@triton.jit(do_not_specialize=["n_chunks"], do_not_specialize_on_alignment=["alpha"])
def combine_out(
    addresses,
    numels,
    chunks,
    n_chunks,
    alpha,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    OUT: tl.constexpr,
    ALIGN: tl.constexpr,
    MISSING: tl.constexpr,
):
    """G0 for all tensors of a table; columns: M gradients, output."""
    alphas = ()
    for i in tl.static_range(M):
        alphas = alphas + (tl.load(alpha + i),)
    block = tl.arange(0, BLOCK)
    column = tl.arange(0, VEC)
    for c in tl.range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        entry = tl.load(chunks + c)
        tensor = entry >> 32
        start = (entry & 0xFFFFFFFF) * CHUNK
        n = tl.load(numels + tensor)
        row = addresses + tensor * (M + 1)
        gs = _pointers(row, start, M, GRAD, ALIGN)
        out = _pointers(row + M, start, 1, OUT, ALIGN)[0]
        whole = (n // VEC) * VEC
        left = tl.minimum(whole - start, CHUNK).to(tl.int32)
        lefts = _bounds(row, left, M, MISSING)
        for k in tl.range(0, left, BLOCK):
            at = k + block
            g = _combined(_gradients(gs, at, lefts, M), alphas, M)
            tl.store(out + at, g.to(OUT), mask=at < left)
        if (whole < n) & (start + CHUNK >= n):
            end = left + (n - whole).to(tl.int32)
            at = left + column
            g = _combined(_gradients(gs, at, _bounds(row, end, M, MISSING), M), alphas, M)
            tl.store(out + at, g.to(OUT), mask=at < end)


@dataclass(frozen=True)
class Scalars:
    """What all tensors of a step share: tensors on the device, float32 but for `seed`.

    `alpha` [m]: the coefficients; `clip` [1]: factor on the gradient; `grad_scale` [1]: divides the
    gradient, as `GradScaler` multiplied the loss; `found_inf` [1]: nonzero skips the step; `seed`
    [1] int64: of stochastic rounding, another one every step and every parameter group.
    """

    alpha: Tensor
    clip: Tensor
    grad_scale: Tensor
    found_inf: Tensor
    seed: Tensor


def combine_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    hyper: Tensor,
    scalars: Scalars,
    rounding: str = "nearest",
    residuals: Sequence[Tensor] | None = None,
) -> None:
    """One AdamW step along G0; weights, states and residuals change in place.

    Args:
        params: n tensors, bfloat16, float16 or float32; bfloat16 unless rounding is "nearest".
            Tensors without any gradient are left alone.
        grads: m <= 32 lists of n tensors or None, each with its weight's shape and element order.
        exp_avgs, exp_avg_sqs: n states each; bfloat16, float16 or float32.
        hyper: [n, 7] float32 on the device, columns `HYPER`.
        scalars: what the step needs besides.
        rounding: "nearest", "stochastic", "split" or "kahan"; see the header.
        residuals: n tensors for "split" (int16) and "kahan" (bfloat16), zeros before the first
            step; None otherwise.
    Raises:
        ValueError: a rounding that is unknown or does not fit the dtypes or `residuals`, or tensors
            that overlap, have gaps or differ in size.
    """
    _check_rounding(params, rounding, residuals)
    m = len(grads)
    device = hyper.device
    columns = [*grads, params, exp_avgs, exp_avg_sqs, *([] if residuals is None else [residuals])]
    for table in build(columns, m, device):
        grid = min(programs(device, PROGRAMS[rounding]), len(table.chunks))
        with current(device):
            combine_adamw_step[(grid,)](
                table.addresses,
                table.numels,
                table.ids,
                table.chunks,
                len(table.chunks),
                hyper,
                scalars.alpha,
                scalars.clip,
                scalars.grad_scale,
                scalars.found_inf,
                scalars.seed,
                **step_constants(m, table, rounding),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


def combine(grads: Sequence[Sequence[Tensor | None]], alpha: Tensor, out: Sequence[Tensor]) -> None:
    """Write G0 = Σ α_i g_i.

    Args:
        grads: m <= 32 lists of n tensors or None; each tensor has at least one gradient.
        alpha: [m] float32 on the device.
        out: n tensors of the gradients' shapes and element orders, bfloat16, float16 or float32;
            out[k] may be one of the gradients of tensor k.
    Raises:
        ValueError: tensors that overlap, have gaps or differ in size.
    """
    m = len(grads)
    for table in build([*grads, out], m, alpha.device):
        grid = min(programs(alpha.device, PROGRAMS["nearest"]), len(table.chunks))
        with current(alpha.device):
            combine_out[(grid,)](
                table.addresses,
                table.numels,
                table.chunks,
                len(table.chunks),
                alpha,
                **out_constants(m, table),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


def step_constants(m: int, table: TensorTable, rounding: str) -> dict[str, object]:
    """What `combine_adamw_step` is specialized on."""
    return {
        "M": m,
        "GRAD": DTYPES[table.dtypes[0]],
        "PARAM": DTYPES[table.dtypes[m]],
        "STATE": DTYPES[table.dtypes[m + 1]],
        "RESIDUAL": DTYPES[table.dtypes[-1]],
        "ROUNDING": rounding,
        **_shape_constants(table),
    }


def out_constants(m: int, table: TensorTable) -> dict[str, object]:
    """What `combine_out` is specialized on."""
    dtypes = {"GRAD": DTYPES[table.dtypes[0]], "OUT": DTYPES[table.dtypes[m]]}
    return {"M": m, **dtypes, **_shape_constants(table)}


def _shape_constants(table: TensorTable) -> dict[str, object]:
    sizes = [dtype.itemsize for dtype in table.dtypes]
    vec = 16 // max(sizes)
    return {
        "CHUNK": table.chunk,
        "VEC": vec,
        "BLOCK": vec * 32 * NUM_WARPS,
        "ALIGN": 16 if table.aligned else min(sizes),
        "MISSING": table.missing,
    }


def _check_rounding(
    params: Sequence[Tensor], rounding: str, residuals: Sequence[Tensor] | None
) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"`rounding` must be one of {ROUNDINGS}, got {rounding!r}")
    if rounding != "nearest":
        for k, p in enumerate(params):
            if p.dtype != torch.bfloat16:
                raise ValueError(
                    f"`rounding`={rounding!r} is for bfloat16 parameters, got {p.dtype} at "
                    f"`params`[{k}]; use 'nearest'"
                )
    wanted = {"split": torch.int16, "kahan": torch.bfloat16}.get(rounding)
    if (wanted is None) != (residuals is None):
        need = f"n tensors of {wanted}" if wanted else "None"
        raise ValueError(f"`residuals` must be {need} for `rounding`={rounding!r}")
    for k, residual in enumerate(residuals or ()):
        if residual.dtype != wanted:
            raise ValueError(
                f"`residuals`[{k}] must be {wanted} for `rounding`={rounding!r}, "
                f"got {residual.dtype}"
            )
