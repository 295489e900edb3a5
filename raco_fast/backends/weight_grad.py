"""The weight gradients of one layer in plain torch: the twin of `kernels/weight_grad.py`.

    G_i = Σ_g U_ig t_g,    t_g = dY_gᵀ X_g    (the rows of group g)

Either one GEMM for each group and a thin product with U, block by block of the weight's rows, or m
GEMMs on scaled rows, whichever is cheaper. Sums are float32 (float64 for float64) whatever the
dtype of x and dY, so a bfloat16 gradient is rounded once.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from raco_fast.backends.transfer import sent

# Bytes of t_g that exist at one time; small enough to be in a cache when they are folded.
_BLOCK_BYTES = 8 << 20
_HALVES = (torch.bfloat16, torch.float16)
# Adding U_ig t_g moves memory where a GEMM computes: measured at about 5 multiply-adds a number.
_FOLD_COST = 5


def weight_grad(
    x: Tensor,
    dy: Tensor,
    bounds: Sequence[int],
    U: Tensor | None,
    out: Tensor,
    fresh: bool,
    products: bool = False,
    look: Callable[[Tensor], None] | None = None,
) -> None:
    """Write or add the m weight gradients of a layer; arguments as for `ops.weight_grad`."""
    x, dy = operand(x), operand(dy)
    if U is None:
        _add_rows(out[0], x, dy, fresh)
        return
    U = sent(U, x.device).to(widened(x[:0]).dtype)
    groups = len(bounds) - 1
    if look is None and not folds(len(U), len(x), groups):
        _add_scaled_rows(x, dy, bounds, U, out, fresh)
        return
    for start, stop in row_blocks(dy.shape[1], 4 * groups * x.shape[1]):
        # t [groups, rows of the block * d_in], folded with U [m, groups] while it is in a cache.
        t = of_groups(x, dy[:, start:stop], bounds).flatten(1)
        if look is not None:
            look(t)
        target = out[:, start:stop]
        if out.dtype != t.dtype or not target[0].is_contiguous():
            store(target, (U @ t).view_as(target), fresh)
        elif fresh:
            torch.mm(U, t, out=target.flatten(1))
        else:
            target.flatten(1).addmm_(U, t)


def folds(m: int, rows: int, groups: int) -> bool:
    """Whether a GEMM for each group and a product with U cost less than m GEMMs."""
    return m > 1 and rows + _FOLD_COST * m * groups <= m * rows


def _add_scaled_rows(
    x: Tensor, dy: Tensor, bounds: Sequence[int], U: Tensor, out: Tensor, fresh: bool
) -> None:
    sizes = sent(torch.tensor(bounds).diff(), U.device)
    # Without its size the output would wait for the device to add up the sizes.
    scales = torch.repeat_interleave(U, sizes, dim=1, output_size=len(x))
    for target, scale in zip(out, scales, strict=True):
        scaled = dy * scale[:, None]  # wide, for the rounding of a half-precision product
        _add_rows(target, x, scaled.to(dy.dtype), fresh)


def _add_rows(target: Tensor, x: Tensor, dy: Tensor, fresh: bool) -> None:
    if target.dtype != dy.dtype or _is_half(dy):
        store(target, product(dy.T, x), fresh)
    elif fresh:
        torch.mm(dy.T, x, out=target)
    else:
        target.addmm_(dy.T, x)


def add_thin(x: Tensor, dy: Tensor, scales: Tensor, out: Tensor, fresh: bool) -> None:
    """Write or add G_i = Σ_r scales_ir dY_r ⊗ X_r by one product for all objectives.

    Args:
        x, dy: [rows, d_in] and [rows, d_out], as `operand` gives them; the one with fewer columns
            is written once for each objective.
        scales: [m, rows], float32 or wider.
        out: [m, d_out, d_in].
    """
    m, d_out, d_in = out.shape
    thin, wide = (dy, x) if d_out <= d_in else (x, dy)
    # Wide, for the rounding of a half-precision product.
    scaled = (thin[:, None] * scales.T[:, :, None]).to(thin.dtype).flatten(1)
    if thin is dy:
        target = out.flatten(0, 1) if out.is_contiguous() else None
        if target is None or target.dtype != dy.dtype or _is_half(dy):
            store(out, product(scaled.T, wide).view_as(out), fresh)
        elif fresh:
            torch.mm(scaled.T, wide, out=target)
        else:
            target.addmm_(scaled.T, wide)
    else:
        store(out, product(wide.T, scaled).view(d_out, m, d_in).transpose(0, 1), fresh)


def of_groups(x: Tensor, dy: Tensor, bounds: Sequence[int]) -> Tensor:
    """t_g of every group, [groups, columns of dy, d_in], of rows that `operand` gave."""
    groups = len(bounds) - 1
    t = widened(dy[:0]).new_empty(groups, dy.shape[1], x.shape[1])
    for g in range(groups):
        rows = slice(*bounds[g : g + 2])
        product(dy[rows].T, x[rows], out=t[g])
    return t


def row_blocks(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of n rows that stay in a cache."""
    return blocks(n, block_rows(row_bytes))


def block_rows(row_bytes: int, multiple: int = 1) -> int:
    """How many rows stay in a cache; a multiple of `multiple`, which may be too many."""
    rows = _BLOCK_BYTES // max(1, row_bytes)
    return max(1, rows // multiple) * multiple


def blocks(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most `size` that cover 0 ... n."""
    return ((start, min(start + size, n)) for start in range(0, n, size))


def operand(x: Tensor) -> Tensor:
    """What a matrix product reads: a GPU multiplies half precision and adds in float32."""
    return x if x.is_cuda else widened(x)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in float32 or wider."""
    if _is_half(a):
        return torch.mm(a, b, torch.float32, out=out)
    return torch.mm(a, b, out=out)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a_k b_k for each k, in float32 or wider."""
    if a.dtype in _HALVES or b.dtype in _HALVES:
        a, b = operand(a), operand(b)
        return torch.bmm(a, b, torch.float32) if _is_half(a) else torch.bmm(a, b)
    return torch.bmm(a, b)


def widened(x: Tensor) -> Tensor:
    """The dtype of the arithmetic: float32 for half precision, otherwise the tensor's own."""
    return x.float() if _is_half(x) else x


def store(out: Tensor, value: Tensor, fresh: bool) -> None:
    """out = value, or out += value; `value` may be used up."""
    if fresh:
        out.copy_(value)
    else:
        # Added before rounding: the sum is rounded once, as autograd's accumulation does.
        out.copy_(value.add_(out))


def _is_half(x: Tensor) -> bool:
    return x.dtype in _HALVES
