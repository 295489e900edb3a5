"""G0 = Σ α_i g_i, written once, for an optimizer that is not ours.

Bytes per element: m x sizeof(gradient) + sizeof(output), each element read or written once (bf16,
m = 2: 6 bytes). The sum is float32 in registers and rounded once. α is read from device memory.
One persistent launch for a model of one dtype; columns.py describes the accesses.
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
from .tables import TensorTable, build, current, programs

# Resident programs per multiprocessor, from the register counts of the compiled kernel.
PROGRAMS = 12


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
        # Which tensor, from which element on; its pointers.
        entry = tl.load(chunks + c)
        tensor = entry >> 32
        start = (entry & 0xFFFFFFFF) * CHUNK
        n = tl.load(numels + tensor)
        row = addresses + tensor * (M + 1)
        gs = pointers(row, start, M, GRAD, ALIGN)
        out = pointers(row + M, start, 1, OUT, ALIGN)[0]
        # Whole vectors of VEC elements, block by block; then what is left of the tensor.
        whole = (n // VEC) * VEC
        left = tl.minimum(whole - start, CHUNK).to(tl.int32)
        lefts = bounds(row, left, M, MISSING)
        for k in tl.range(0, left, BLOCK):
            at = k + block
            g = weighted_sum(gradients(gs, at, lefts, M), alphas, M)
            tl.store(out + at, g.to(OUT), mask=at < left)
        if (whole < n) & (start + CHUNK >= n):
            end = left + (n - whole).to(tl.int32)
            at = left + column
            g = weighted_sum(gradients(gs, at, bounds(row, end, M, MISSING), M), alphas, M)
            tl.store(out + at, g.to(OUT), mask=at < end)


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
        grid = min(programs(alpha.device, PROGRAMS), len(table.chunks))
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


def out_constants(m: int, table: TensorTable) -> dict[str, object]:
    """What `combine_out` is specialized on."""
    dtypes = {"GRAD": DTYPES[table.dtypes[0]], "OUT": DTYPES[table.dtypes[m]]}
    return {"M": m, **dtypes, **shape_constants(table)}
