"""Proves the Triton kernels against the reference before they are used on a device.

Compilers, drivers and cards differ, and a kernel that is wrong on one of them trains a wrong model
without a sign. A few small tensors of odd sizes show it in the first step of a process.
"""

import math
from collections.abc import Callable, Sequence
from subprocess import CalledProcessError
from typing import TypeAlias

import torch
from torch import Tensor
from triton import TritonError

from raco_fast.backends import reference
from raco_fast.backends.rounding import NEAREST, Rounding
from raco_fast.backends.types import AdamWOptions, Backend, Metric, Update

_SIZES = (1, 37, 1031, 4099)
_BOUNDS = (0, 65, 65, 66, 190)  # groups of a layer's rows, around a k-block of 64
_Comparison: TypeAlias = Callable[[Backend, torch.device, torch.dtype], str | None]
_OPTIONS = AdamWOptions(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)


def disagreement(backend: Backend, part: str, device: torch.device) -> str | None:
    """What a backend gets wrong on this device, in words; None if nothing.

    Args:
        backend: compared with `reference`, on two objectives.
        part: "step" for `gram`, `combine` and `combine_adamw`, float32 and bfloat16, and split
        rounding; "gram_in_metric" for float32 and bfloat16, second moments in float32;
        "weight_grad" for bfloat16 rows of a layer, with float32 gradients written and bfloat16
        ones added to, and their products. Compiles eight, two or two kernels the first time on
        a machine; the random number generators are left alone.
        device: where.
    """
    bf16 = torch.bfloat16
    tests: dict[str, list[tuple[_Comparison, torch.dtype]]] = {
        "step": [(_of_a_step, torch.float32), (_of_a_step, bf16), (_of_split_rounding, bf16)],
        "gram_in_metric": [(_of_a_metric, torch.float32), (_of_a_metric, bf16)],
        "weight_grad": [(_of_a_layer, bf16)],
    }
    for compare, dtype in tests[part]:
        try:
            found = compare(backend, device, dtype)
        except (TritonError, CalledProcessError, RuntimeError, OSError) as error:
            # No compiler, no driver, out of resources: reported, and the reference can still run.
            return f"the kernels for {dtype} failed with {type(error).__name__}: {error}"
        if found is not None:
            return f"`{found}` of {dtype} tensors differs from plain torch"
    return None


def _wave(n: int, phase: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.arange(n, dtype=torch.float64).mul(0.7).add(phase).sin().to(device, dtype)


def _waves(phase: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [_wave(n, phase, device, dtype) for n in _SIZES]


def _of_a_step(kernels: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    def tensors(phase: int) -> list[Tensor]:
        return _waves(phase, device, dtype)

    grads = [tensors(1), tensors(2)]
    alpha = torch.tensor([0.75, 0.5], dtype=torch.float64)
    ours: list[Tensor] = [kernels.gram(grads, {}).cpu()]
    theirs: list[Tensor] = [reference.gram(grads)]
    if not _agree(ours, theirs, 1e-5):
        return "gram"
    tolerance = 4 * torch.finfo(dtype).eps
    ours, theirs = tensors(0), tensors(0)
    kernels.combine(grads, alpha, ours)
    reference.combine(grads, alpha, theirs)
    if not _agree(ours, theirs, tolerance):
        return "combine"
    stepped = []
    for backend in (kernels, reference):
        update = _update(device, dtype, dtype)
        backend.combine_adamw(update, alpha, {})
        stepped.append([*update.params, *update.exp_avgs, *update.exp_avg_sqs])
    return None if _agree(stepped[0], stepped[1], tolerance) else "combine_adamw"


def _of_a_metric(kernels: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    grads = [_waves(phase, device, dtype) for phase in (1, 2)]
    squares = [t.square() for t in _waves(3, device, torch.float32)]
    moments: list[Tensor | None] = [None, *squares[1:]]
    numbers = torch.tensor([[1.5, 1e-3, 0.5]], dtype=torch.float64).expand(len(moments), 3)
    metric = Metric(moments, numbers)
    ours = kernels.gram_in_metric(grads, metric, {}).cpu().unbind()
    theirs = reference.gram_in_metric(grads, metric).unbind()
    return None if _agree(ours, theirs, 1e-5) else "gram_in_metric"


def _of_split_rounding(kernels: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """The float32 weights that two halves stand for show what the rounded ones would hide."""
    stepped = []
    for backend in (kernels, reference):
        rounding = Rounding("split", [torch.zeros_like(p) for p in _waves(3, device, dtype)])
        update = _update(device, dtype, torch.float32, rounding)
        backend.combine_adamw(update, torch.tensor([0.75, 0.5], dtype=torch.float64), {})
        stepped.append([rounding.opened(p, k) for k, p in enumerate(update.params)])
    return None if _agree(stepped[0], stepped[1], 1e-5) else "combine_adamw, split"


def _update(
    device: torch.device, dtype: torch.dtype, state: torch.dtype, rounding: Rounding = NEAREST
) -> Update:
    """A step in the middle of a run, with states of the dtype `state`."""
    averages, squares = ([t.to(state) for t in _waves(k, device, dtype)] for k in (4, 5))
    return Update(
        params=_waves(3, device, dtype),
        grads=[_waves(1, device, dtype), _waves(2, device, dtype)],
        exp_avgs=averages,
        exp_avg_sqs=[t.square() for t in squares],
        max_exp_avg_sqs=[],
        steps=[torch.tensor(3.0) for _ in _SIZES],
        options=_OPTIONS,
        rounding=rounding,
    )


def _of_a_layer(kernels: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    rows, d_in, d_out = _BOUNDS[-1], 144, 272  # several tiles, with ragged ones
    shape = (2, d_out, d_in)
    x = _wave(rows * d_in, 1, device, dtype).view(rows, d_in)
    dy = _wave(rows * d_out, 2, device, dtype).view(rows, d_out)
    U = torch.linspace(-1, 1.5, 2 * (len(_BOUNDS) - 1), dtype=torch.float64).view(2, -1)
    for out, fresh, tolerance in (
        (torch.full(shape, torch.nan, device=device), True, 1e-4),
        (_wave(math.prod(shape), 3, device, dtype).view(shape), False, 4 * torch.finfo(dtype).eps),
    ):
        ours, theirs = out.clone(), out.clone()
        products = kernels.weight_grad(x, dy, _BOUNDS, U, ours, fresh, products=True)
        reference.weight_grad(x, dy, _BOUNDS, U, theirs, fresh)
        if not _agree([*ours], [*theirs], tolerance):
            return "weight_grad"
        exact = reference.gram([[g] for g in ours])
        if products is None or not _agree([products.cpu()], [exact], 1e-5):
            return "weight_grad, products"
    return None


def _agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether no element is off by more than `tolerance` of the largest in its tensor."""
    return all(
        bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )
