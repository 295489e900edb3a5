"""The Gram matrix of m gradients over all tensors of a model, in one pass over memory.

    M_ij = Σ_e g_i[e] g_j[e]                    arXiv 2602.02495, Algorithm 1, line 5

Bytes per element: m x sizeof(gradient), each read exactly once (bf16, m = 2: 4 bytes), for m <= 8.
The rival, m(m+1)/2 dot products per tensor, reads every gradient m + 1 times. A larger m is cut
into blocks of at most 4 objectives and one launch per pair of blocks, so each element is read
ceil(m/4) - 1 times (m = 12: twice; m = 32: seven times) by the kernels for m <= 8.

Why this design:
- One persistent launch. Program p takes chunks p, p + P, p + 2P ...; its sums stay in registers and
  leave them once, as m(m+1)/2 numbers. A second launch adds the P partial results in float64 in a
  fixed order. No float atomics: equal inputs on an equal grid give equal bits. The grid must
  therefore never be autotuned, and is set explicitly where two cards have to agree.
- Products and sums within a program are float32. Every thread keeps sums of its own, so a chain of
  additions is about 1e4 long for 8e9 elements (relative error 1e-7, 4e-6 for log-normal scales).
  A running sum in bf16, the usual code, is off by percents.
- Each thread holds VEC = 16 bytes of neighbouring elements of each gradient, as one row of a
  [BLOCK / VEC, VEC] tile (of misaligned tensors VEC = 2 elements, each a neighbour of the next
  thread's); `tl.sum(axis=1)` then stays inside the thread. One accumulator per pair
  and thread is what keeps m = 8 (36 pairs) free of spills.
- 16-byte loads through addresses from a table need two things, or bf16 is read 2 bytes at a time:
  `tl.multiple_of` on the pointer, and a mask bound that is a multiple of VEC. So the bound is
  rounded down, and the at most VEC - 1 elements behind it are a scalar tail, once per tensor.
- A missing gradient has address 0, and its bound is 0: it is never read and counts as zeros.
  Models without one (MISSING = False) share one bound, and so one predicate, for all loads.
- Offsets into a tensor are 64 bits wide: the start of a chunk is added to the pointer as int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import TensorTable, architecture, build, current, programs

MAX_UNROLLED = 8
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
NUM_WARPS = 4
# Resident programs per multiprocessor, by m: as many as the compiler leaves room for without
# spilling. It needs more registers on sm_100 and later, and where gradients are missing.
PROGRAMS = {1: 16, 2: 16, 3: 10, 4: 7, 5: 5, 6: 4, 7: 3, 8: 3}
PROGRAMS_SM_100 = {**PROGRAMS, 4: 5, 5: 4, 6: 3, 8: 2}
PROGRAMS_IF_MISSING = {2: 12, 3: 9}


def resident_programs(m: int, architecture: int, missing: bool) -> int:
    """Programs of `gram_partials` per multiprocessor of sm_XY; they fix the order of the sums."""
    of_m = (PROGRAMS_SM_100 if architecture >= 100 else PROGRAMS)[m]
    return PROGRAMS_IF_MISSING.get(m, of_m) if missing else of_m


def registers(resident: int) -> int:
    """The most registers per thread with which so many programs are resident at one time."""
    return min(255, 65536 // (32 * NUM_WARPS * resident) // 8 * 8)


@triton.jit
def _add_products(sums, xs, M: tl.constexpr, ROWWISE: tl.constexpr):
    added = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i, M):
            product = xs[i] * xs[j]
            if ROWWISE:
                product = tl.sum(product, axis=1)
            else:
                product = tl.sum(product)
            added = added + (sums[len(added)] + product,)
    return added


@triton.jit(do_not_specialize=["n_chunks"], do_not_specialize_on_alignment=["partials"])
def gram_partials(
    addresses,
    numels,
    chunks,
    n_chunks,
    partials,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Row p of `partials` [P, M(M+1)/2] float32: program p's share of M_ij, i <= j."""
    PAIRS: tl.constexpr = M * (M + 1) // 2
    program = tl.program_id(0)
    column = tl.arange(0, VEC)
    row = tl.arange(0, BLOCK // VEC)[:, None]
    if ALIGN % 16 == 0:
        lane = row * VEC + column[None, :]
    else:  # a thread reads one element at a time: neighbours of those of the next thread
        lane = row + column[None, :] * (BLOCK // VEC)
    # Per pair i <= j: sums [BLOCK / VEC] of the main loop, one a thread; a scalar for the tails.
    sums = ()
    tails = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros((BLOCK // VEC,), tl.float32),)
        tails = tails + (tl.zeros((), tl.float32),)
    for c in tl.range(program, n_chunks, tl.num_programs(0)):
        # Which tensor, from which element on, and how many whole vectors of it.
        entry = tl.load(chunks + c)
        tensor = entry >> 32
        start = (entry & 0xFFFFFFFF) * CHUNK
        n = tl.load(numels + tensor)
        whole = (n // VEC) * VEC
        left = tl.minimum(whole - start, CHUNK).to(tl.int32)
        # Its m gradients, as pointers to that element, and the bound of each.
        gs = ()
        lefts = ()
        for i in tl.static_range(M):
            address = tl.load(addresses + tensor * M + i)
            g = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGN)
            gs = gs + (g + start,)
            if MISSING:
                lefts = lefts + (tl.where(address != 0, left, 0),)
            else:
                lefts = lefts + (left,)
        # Blocks [BLOCK / VEC, VEC] of each gradient; all pairs of products.
        for k in tl.range(0, left, BLOCK):
            xs = ()
            for i in tl.static_range(M):
                x = tl.load(gs[i] + (k + lane), mask=k + lane < lefts[i], other=0.0)
                xs = xs + (x.to(tl.float32),)
            sums = _add_products(sums, xs, M, True)
        # Behind the last whole vector: at most VEC - 1 elements of the tensor.
        if (whole < n) & (start + CHUNK >= n):
            rest = (n - whole).to(tl.int32)
            xs = ()
            for i in tl.static_range(M):
                # Loaded again: m bounds kept for the tail would be registers of the main loop.
                bound = tl.where(tl.load(addresses + tensor * M + i) != 0, rest, 0)
                x = tl.load(gs[i] + (left + column), mask=column < bound, other=0.0)
                xs = xs + (x.to(tl.float32),)
            tails = _add_products(tails, xs, M, False)
    for q in tl.static_range(PAIRS):
        tl.store(partials + program * PAIRS + q, tl.sum(sums[q]) + tails[q])


@triton.jit(do_not_specialize=["n_partials"])
def gram_total(partials, n_partials, total, M: tl.constexpr, BLOCK: tl.constexpr):
    """`total` [M, M] float64: the sums of the columns of `partials`, in a fixed order."""
    PAIRS: tl.constexpr = M * (M + 1) // 2
    row = tl.arange(0, BLOCK)
    for i in tl.static_range(M):
        for j in tl.static_range(i, M):
            pair = partials + i * M - (i * (i - 1)) // 2 + (j - i)
            lanes = tl.zeros((BLOCK,), tl.float64)
            for p in tl.range(0, n_partials, BLOCK):
                at = (p + row) * PAIRS
                lanes += tl.load(pair + at, mask=p + row < n_partials, other=0.0).to(tl.float64)
            entry = tl.sum(lanes)
            tl.store(total + i * M + j, entry)
            tl.store(total + j * M + i, entry)


def gram(
    grads: Sequence[Sequence[Tensor | None]],
    device: torch.device,
    programs_per_multiprocessor: int | None = None,
    tables: Sequence[TensorTable] | None = None,
) -> Tensor:
    """Gram matrix of m lists of n gradients.

    Args:
        grads: m <= 32 lists of n tensors or None (zeros) on `device`; bfloat16, float16 or float32;
            tensor k has the same dtype, shape and element order in every list.
        device: of the gradients and of the result.
        programs_per_multiprocessor: size of the grid; it fixes the order of the sums.
        tables: `build(grads, m, device)` of an earlier call with the same gradients, m <= 8.
    Returns:
        [m, m] float64 on `device`, exactly symmetric. Nothing waits for the device.
    Raises:
        ValueError: tensors whose elements overlap or have gaps.
    """
    m = len(grads)
    if tables is None and m > MAX_UNROLLED:

        def part(members: Sequence[int]) -> Tensor:
            return gram([grads[i] for i in members], device, programs_per_multiprocessor)

        return in_blocks(m, part, torch.empty(m, m, dtype=torch.float64, device=device))
    if tables is None:
        tables = build(grads, m, device)
    with current(device):
        return _gram_of_tables(tables, m, device, programs_per_multiprocessor)


def objective_blocks(m: int, most: int = MAX_UNROLLED) -> list[range]:
    """m > `most` objectives in blocks of nearly equal size, any two of which fit one launch."""
    count = -(-m // (most // 2))
    edges = [m * b // count for b in range(count + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def in_blocks(
    m: int, part: Callable[[Sequence[int]], Tensor], total: Tensor, most: int = MAX_UNROLLED
) -> Tensor:
    """`total` [.., m, m], filled with what `part` gives for two blocks of objectives at a time."""
    blocks = objective_blocks(m, most)
    for a, first in enumerate(blocks):
        for second in blocks[a + 1 :]:
            members = [*first, *second]
            found = part(members)
            for of_part, i in enumerate(members):
                # Slices, not an index tensor: that would be copied from pageable memory.
                total[..., i, first.start : first.stop] = found[..., of_part, : len(first)]
                total[..., i, second.start : second.stop] = found[..., of_part, len(first) :]
    return total


def _gram_of_tables(
    tables: Sequence[TensorTable], m: int, device: torch.device, per_multiprocessor: int | None
) -> Tensor:
    on = architecture(device)
    grids = []
    for table in tables:
        resident = per_multiprocessor or resident_programs(m, on, table.missing)
        grids.append(min(programs(device, resident), len(table.chunks)))
    partials = torch.empty(sum(grids), m * (m + 1) // 2, dtype=torch.float32, device=device)
    total = torch.empty(m, m, dtype=torch.float64, device=device)
    row = 0
    for table, grid in zip(tables, grids, strict=True):
        gram_partials[(grid,)](
            table.addresses,
            table.numels,
            table.chunks,
            len(table.chunks),
            partials[row:],
            **partials_constants(m, table),
            **partials_options(m, on, table.missing),
        )
        row += grid
    gram_total[(1,)](
        partials, row, total, M=m, BLOCK=128, num_warps=NUM_WARPS, enable_fp_fusion=True
    )
    return total


def partials_constants(m: int, table: TensorTable) -> dict[str, object]:
    """What `gram_partials` is specialized on: 16 bytes per thread and gradient.

    Misaligned tensors are read element by element; more than 2 of them per thread would need more
    registers than there are from m = 6 on.
    """
    size = table.dtypes[0].itemsize
    vec = 16 // size if table.aligned else 2
    return {
        "M": m,
        "CHUNK": table.chunk,
        "VEC": vec,
        "BLOCK": vec * 32 * NUM_WARPS,
        "DTYPE": DTYPES[table.dtypes[0]],
        "ALIGN": 16 if table.aligned else size,
        "MISSING": table.missing,
    }


def partials_options(m: int, architecture: int, missing: bool) -> dict[str, object]:
    """How `gram_partials` is compiled: held to the registers that its grid counts on."""
    limit = registers(resident_programs(m, architecture, missing))
    return {"num_warps": NUM_WARPS, "enable_fp_fusion": True, "maxnreg": limit}
