"""A head's products with float32 results, from operands of half precision.

A product in bfloat16 rounds every logit to 8 bits: at a logit of 20, to steps of 1/8. On a GPU the
product itself can give float32. On a CPU torch has no such product (`torch.mm` takes `out_dtype` on
CUDA alone), so there pieces of W are widened, small enough to stay in a cache, and multiplied in
float32: the same numbers, and several times as fast where the processor has no bfloat16 products.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from raco_fast.backends.weight_grad import operand, product, row_blocks, widened


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """hidden Wᵀ + b.

    Args:
        hidden: [N, d], as `operand` gives it for `dtype`.
        weight: [rows, d]; bias: [rows] or None; of any floating dtype.
        dtype: that of the numbers that are multiplied: hidden's own before `operand`.
    Returns:
        [N, rows] float32 (float64 for float64), never rounded to `dtype`.
    """
    y = widened(hidden[:0]).new_empty(len(hidden), len(weight))
    for columns, part in _pieces(weight, dtype):
        product(hidden, part.T, out=y[:, columns])
    return y if bias is None else y.add_(bias.to(dtype))


def add_hidden_gradient(dx: Tensor, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """dx [N, d] += dY W in dx's dtype, float32 or wider; arguments as for `logits`."""
    for columns, part in _pieces(weight, dtype):
        if dx.dtype == part.dtype:
            dx.addmm_(dy[:, columns], part)
        else:
            dx.add_(product(dy, part))


def _pieces(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those of W as a product with `operand(hidden)` reads them)."""
    if operand(weight[:0].to(dtype)).dtype == dtype:
        yield slice(None), weight.to(dtype)
        return
    for start, stop in row_blocks(len(weight), 4 * weight.shape[1]):
        yield slice(start, stop), operand(weight[start:stop].to(dtype))
