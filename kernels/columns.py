"""What the update kernels share: a table's row of addresses as pointers, and G0 at some offsets.

A row holds M gradients, then the tensors that are written. Three rules make every access of the
main loop 16 bytes wide and safe (gram.py, which has a loop of its own, says why):

- a pointer is declared a multiple of ALIGN, and the start of a chunk added to it as int64;
- the main loop's bound is rounded down to VEC elements, the rest is a scalar tail of the tensor;
- a missing gradient has address 0 and bound 0: it is never read and counts as zeros.

16 / (largest element size) elements per thread. With more, the stores of the wider tensors do not
fit 16 bytes, and Triton exchanges data between threads through shared memory to make them fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tables import TensorTable

DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int16: tl.int16,
}
NUM_WARPS = 4


@triton.jit
def pointers(row, start, COUNT: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to element `start` of the tensors in COUNT columns of a row."""
    found = ()
    for i in tl.static_range(COUNT):
        pointer = tl.load(row + i).to(tl.pointer_type(TYPE))
        found = found + (tl.multiple_of(pointer, ALIGN) + start,)
    return found


@triton.jit
def bounds(row, n, M: tl.constexpr, MISSING: tl.constexpr):
    """n for each gradient that exists, 0 for each that is missing."""
    found = ()
    for i in tl.static_range(M):
        if MISSING:
            found = found + (tl.where(tl.load(row + i) != 0, n, 0),)
        else:
            found = found + (n,)
    return found


@triton.jit
def gradients(gs, at, ends, M: tl.constexpr):
    """The M gradients at the offsets `at`, as loaded; zero behind a gradient's bound."""
    loaded = ()
    for i in tl.static_range(M):
        loaded = loaded + (tl.load(gs[i] + at, mask=at < ends[i], other=0.0),)
    return loaded


@triton.jit
def weighted_sum(loaded, alphas, M: tl.constexpr):
    """Σ α_i g_i in float32."""
    g = alphas[0] * loaded[0].to(tl.float32)
    for i in tl.static_range(1, M):
        g += alphas[i] * loaded[i].to(tl.float32)
    return g


def shape_constants(table: TensorTable) -> dict[str, object]:
    """The constants of a launch that follow from its table's element sizes and alignment."""
    sizes = [dtype.itemsize for dtype in table.dtypes]
    vec = 16 // max(sizes)
    return {
        "CHUNK": table.chunk,
        "VEC": vec,
        "BLOCK": vec * 32 * NUM_WARPS,
        "ALIGN": 16 if table.aligned else min(sizes),
        "MISSING": table.missing,
    }
