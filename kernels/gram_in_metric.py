"""The Gram matrix of m gradients, and that in the metric of AdamW's update, in one pass.

    M_ij = Σ_e g_i[e] g_j[e]
    H_ij = Σ_e (s[e] g_i[e]) (s[e] g_j[e]),   s = √(factor / (√v root + eps)), 0 where v = 0

Bytes per element: the m gradients and the second moment v, each read exactly once (bf16, m = 2,
v in float32: 8 bytes), for m <= 6. The rival, a Gram matrix and then one of scaled copies, reads
the gradients twice, writes m copies and reads them again.

The design is that of gram.py, which says why. What differs:
- A table's last column is v. A tensor without one has address 0 there, and no part in H.
- root, eps and factor are three float32 numbers of each tensor, found by its place in the caller's
  lists.
- 16 bytes of the wider of gradients and v per thread, so that both are read in whole vectors; two
  sums per pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gram import (
    DTYPES,
    NUM_WARPS,
    _add_products,
    gram_total,
    in_blocks,
)
from .tables import TensorTable, build, current, programs

MAX_UNROLLED = 6  # 8 objectives have 72 sums, and spill on sm_100
# Resident programs per multiprocessor, by m; they fix the order of the sums.
PROGRAMS = {1: 10, 2: 8, 3: 6, 4: 4, 5: 2, 6: 2}
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}


@triton.jit(
    do_not_specialize=["n_chunks"], do_not_specialize_on_alignment=["numbers", "partials", "turned"]
)
def metric_partials(
    addresses,
    numels,
    ids,
    chunks,
    n_chunks,
    numbers,
    partials,
    turned,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    MOMENT: tl.constexpr,
    ALIGN: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Row p of `partials` and `turned` [P, M(M+1)/2] float32: program p's share of M_ij, H_ij."""
    PAIRS: tl.constexpr = M * (M + 1) // 2
    COLUMNS: tl.constexpr = M + 1
    program = tl.program_id(0)
    column = tl.arange(0, VEC)
    row = tl.arange(0, BLOCK // VEC)[:, None]
    if ALIGN % 16 == 0:
        lane = row * VEC + column[None, :]
    else:
        lane = row + column[None, :] * (BLOCK // VEC)
    # Per pair i <= j: sums of the main loop, one a thread, and scalars for the tails; of M and H.
    sums = ()
    tails = ()
    for _ in tl.static_range(2 * PAIRS):
        sums = sums + (tl.zeros((BLOCK // VEC,), tl.float32),)
        tails = tails + (tl.zeros((), tl.float32),)
    for c in tl.range(program, n_chunks, tl.num_programs(0)):
        entry = tl.load(chunks + c)
        tensor = entry >> 32
        start = (entry & 0xFFFFFFFF) * CHUNK
        n = tl.load(numels + tensor)
        whole = (n // VEC) * VEC
        left = tl.minimum(whole - start, CHUNK).to(tl.int32)
        number = numbers + tl.load(ids + tensor) * 3
        root, eps, factor = tl.load(number), tl.load(number + 1), tl.load(number + 2)
        gs = ()
        lefts = ()
        for i in tl.static_range(M):
            address = tl.load(addresses + tensor * COLUMNS + i)
            g = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGN)
            gs = gs + (g + start,)
            if MISSING:
                lefts = lefts + (tl.where(address != 0, left, 0),)
            else:
                lefts = lefts + (left,)
        address = tl.load(addresses + tensor * COLUMNS + M)
        v = tl.multiple_of(address.to(tl.pointer_type(MOMENT)), ALIGN) + start
        v_left = tl.where(address != 0, left, 0) if MISSING else left
        for k in tl.range(0, left, BLOCK):
            at = k + lane
            xs = ()
            for i in tl.static_range(M):
                x = tl.load(gs[i] + at, mask=at < lefts[i], other=0.0)
                xs = xs + (x.to(tl.float32),)
            second = tl.load(v + at, mask=at < v_left, other=0.0).to(tl.float32)
            sums = _add_both(sums, xs, second, root, eps, factor, M, True)
        # Behind the last whole vector: at most VEC - 1 elements of the tensor.
        if (whole < n) & (start + CHUNK >= n):
            rest = (n - whole).to(tl.int32)
            xs = ()
            for i in tl.static_range(M):
                bound = tl.where(tl.load(addresses + tensor * COLUMNS + i) != 0, rest, 0)
                x = tl.load(gs[i] + (left + column), mask=column < bound, other=0.0)
                xs = xs + (x.to(tl.float32),)
            bound = tl.where(tl.load(addresses + tensor * COLUMNS + M) != 0, rest, 0)
            second = tl.load(v + (left + column), mask=column < bound, other=0.0).to(tl.float32)
            tails = _add_both(tails, xs, second, root, eps, factor, M, False)
    for q in tl.static_range(PAIRS):
        tl.store(partials + program * PAIRS + q, tl.sum(sums[q]) + tails[q])
        of_turned = tl.sum(sums[PAIRS + q]) + tails[PAIRS + q]
        tl.store(turned + program * PAIRS + q, of_turned)


@triton.jit
def _add_both(sums, xs, second, root, eps, factor, M: tl.constexpr, ROWWISE: tl.constexpr):
    PAIRS: tl.constexpr = M * (M + 1) // 2
    of_gradients = ()
    of_turned = ()
    for q in tl.static_range(PAIRS):
        of_gradients = of_gradients + (sums[q],)
        of_turned = of_turned + (sums[PAIRS + q],)
    of_gradients = _add_products(of_gradients, xs, M, ROWWISE)
    s = tl.where(second == 0.0, 0.0, tl.sqrt(factor / (tl.sqrt(second) * root + eps)))
    ys = ()
    for i in tl.static_range(M):
        ys = ys + (xs[i] * s,)
    return of_gradients + _add_products(of_turned, ys, M, ROWWISE)


def gram_in_metric(
    grads: Sequence[Sequence[Tensor | None]],
    moments: Sequence[Tensor | None],
    numbers: Tensor,
    device: torch.device,
    tables: Sequence[TensorTable] | None = None,
) -> Tensor:
    """M and H of m lists of n gradients.

    Args:
        grads: m <= 32 lists of n tensors or None (zeros) on `device`; bfloat16, float16 or float32;
            tensor k has the same dtype, shape and element order in every list.
        moments: n tensors v of those shapes and element orders, of any of these dtypes; None: s = 0
            for the whole tensor.
        numbers: [n, 3] float32 on `device`: root, eps, factor.
        device: of all of them and of the result.
        tables: `build([*grads, moments], m, device)` of an earlier call, m <= 6.
    Returns:
        [2, m, m] float64 on `device`, exactly symmetric. Nothing waits for the device.
    Raises:
        ValueError: tensors whose elements overlap or have gaps.
    """
    m = len(grads)
    if tables is None and m > MAX_UNROLLED:

        def part(members: Sequence[int]) -> Tensor:
            return gram_in_metric([grads[i] for i in members], moments, numbers, device)

        total = torch.empty(2, m, m, dtype=torch.float64, device=device)
        return in_blocks(m, part, total, MAX_UNROLLED)
    if tables is None:
        tables = build([*grads, moments], m, device)
    with current(device):
        return _of_tables(tables, m, numbers, device)


def _of_tables(
    tables: Sequence[TensorTable], m: int, numbers: Tensor, device: torch.device
) -> Tensor:
    grids = [min(programs(device, PROGRAMS[m]), len(table.chunks)) for table in tables]
    shape = (2, sum(grids), m * (m + 1) // 2)
    partials = torch.empty(shape, dtype=torch.float32, device=device)
    total = torch.empty(2, m, m, dtype=torch.float64, device=device)
    row = 0
    for table, grid in zip(tables, grids, strict=True):
        metric_partials[(grid,)](
            table.addresses,
            table.numels,
            table.ids,
            table.chunks,
            len(table.chunks),
            numbers,
            partials[0, row:],
            partials[1, row:],
            **partials_constants(m, table),
            **partials_options(m),
        )
        row += grid
    for of_one, into in zip(partials, total, strict=True):
        gram_total[(1,)](of_one, row, into, M=m, BLOCK=128, **OPTIONS)
    return total


def partials_options(m: int) -> dict[str, object]:
    """How `metric_partials` is compiled.

    Of few objectives without a limit of registers: under one that is larger than what it takes by
    itself ptxas unrolls and spills. Of many with the largest: without, ptxas aims at three programs
    a multiprocessor on sm_100, and spills for m = 5.
    """
    return {**OPTIONS, "maxnreg": 255} if m > 4 else {**OPTIONS}


def partials_constants(m: int, table: TensorTable) -> dict[str, object]:
    """What `metric_partials` is specialized on; see `gram.partials_constants`."""
    gradient, moment = table.dtypes[0], table.dtypes[m]
    sizes = gradient.itemsize, moment.itemsize
    vec = 16 // max(sizes) if table.aligned else 2
    return {
        "M": m,
        "CHUNK": table.chunk,
        "VEC": vec,
        "BLOCK": vec * 32 * NUM_WARPS,
        "DTYPE": DTYPES[gradient],
        "MOMENT": DTYPES[moment],
        "ALIGN": 16 if table.aligned else min(sizes),
        "MISSING": table.missing,
    }
