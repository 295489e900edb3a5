"""The Triton backend of `weight_grad`: which layers its kernel takes, for which it is worth while.

A layer's rows stay in half precision, m and the groups stay on the host, and nothing waits for the
device: the table of k-blocks and the coefficients, alike for all layers of one pass, are sent once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from raco_fast.kernels import weight_grad as kernel
from raco_fast.kernels.tables import ALIGNMENT
from raco_fast.kernels.weight_grad_plan import pays

INPUTS = (torch.bfloat16, torch.float16)
OUTPUTS = (*INPUTS, torch.float32)


def weight_grad(
    x: Tensor, dy: Tensor, bounds: Sequence[int], U: Tensor, out: Tensor, fresh: bool
) -> None:
    """Write or add the m weight gradients of a layer; as `weight_grad.weight_grad`.

    Rows that lie with gaps are copied; this is rare.
    """
    rows = (x.contiguous(), dy.contiguous())
    kernel.weight_grad(*rows, bounds, U.float(), out.unbind(), accumulate=not fresh)


def unsupported(x: Tensor, dy: Tensor, out: Tensor) -> str | None:
    """Why the kernel cannot form these gradients; None if it can.

    Args:
        x, dy, out: plain tensors of one CUDA device.
    """
    if x.dtype not in INPUTS or dy.dtype != x.dtype:
        return (
            f"its kernel takes bfloat16 or float16 inputs and output gradients of one dtype, got "
            f"{x.dtype} and {dy.dtype}"
        )
    if out.dtype not in OUTPUTS or not out[0].is_contiguous():
        return (
            f"its kernel writes contiguous bfloat16, float16 or float32 gradients, got {out.dtype} "
            f"with strides {out.stride()[1:]}"
        )
    return None


def slower(x: Tensor, dy: Tensor, bounds: Sequence[int], m: int, out: Tensor) -> str | None:
    """Why plain torch is the better choice where the kernel could run; None if it is not."""
    if any(t.data_ptr() % ALIGNMENT for t in (x, dy, out)):
        return f"rows at addresses that are no multiple of {ALIGNMENT} are read one by one"
    groups = sum(start < stop for start, stop in pairwise(bounds))
    d_in, d_out = x.shape[1], dy.shape[1]
    if not groups or not pays(len(x), groups, m, d_in, d_out):
        return (
            f"m = {m} plain products are modelled to be faster for {len(x)} rows in {groups} "
            f"groups, {d_in} by {d_out} features"
        )
    return None
