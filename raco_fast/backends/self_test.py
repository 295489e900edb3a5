"""Proves the Triton kernels against the reference before they are used on a device.

Compilers, drivers and cards differ, and a kernel that is wrong on one of them trains a wrong model
without a sign. A few small tensors of odd sizes show it in the first step of a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from subprocess import CalledProcessError

import torch
from torch import Tensor
from triton import TritonError

from raco_fast.backends import cuda, reference
from raco_fast.backends.reference import adamw_options
from raco_fast.backends.rounding import Rounding

_SIZES = (1, 37, 1031, 4099)
_BOUNDS = (0, 65, 65, 66, 190)  # groups of a layer's rows, around a k-block of 64
_OPTIONS = adamw_options(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)


def disagreement(device: torch.device) -> str | None:
    """What the Triton kernels of a step get wrong on this device, in words; None if nothing.

    `gram`, `combine` and `combine_adamw` of two objectives, float32 and bfloat16, and split
    rounding, against `reference.py`. Compiles eight kernels the first time on a machine; the random
    number generators are left alone.
    """
    for dtype in (torch.float32, torch.bfloat16):
        found = _reported(_of_a_step, device, dtype)
        if found is not None:
            return found
    return _reported(_of_split_rounding, device, torch.bfloat16)


def weight_grad_disagreement(device: torch.device) -> str | None:
    """What `weight_grad` gets wrong on this device, in words; None if nothing.

    bfloat16 rows of two objectives: float32 gradients written, bfloat16 ones added to. Compiles two
    kernels the first time on a machine.
    """
    return _reported(_of_a_layer, device, torch.bfloat16)


def _reported(
    compare: Callable[[torch.device, torch.dtype], str | None],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    try:
        found = compare(device, dtype)
    except (TritonError, CalledProcessError, RuntimeError, OSError) as error:
        # No compiler, no driver, out of resources: reported, and the reference can still run.
        return f"the kernels for {dtype} failed with {type(error).__name__}: {error}"
    return None if found is None else f"`{found}` of {dtype} tensors differs from plain torch"


def _wave(n: int, phase: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.arange(n, dtype=torch.float64).mul(0.7).add(phase).sin().to(device, dtype)


def _waves(phase: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [_wave(n, phase, device, dtype) for n in _SIZES]


def _of_a_step(device: torch.device, dtype: torch.dtype) -> str | None:
    def tensors(phase: int) -> list[Tensor]:
        return _waves(phase, device, dtype)

    grads = [tensors(1), tensors(2)]
    alpha = torch.tensor([0.75, 0.5], dtype=torch.float64)
    ours: list[Tensor] = [cuda.gram(grads)]
    theirs: list[Tensor] = [reference.gram(grads)]
    if not _agree(ours, theirs, 1e-5):
        return "gram"
    tolerance = 4 * torch.finfo(dtype).eps
    ours, theirs = tensors(0), tensors(0)
    cuda.combine(grads, alpha, ours)
    reference.combine(grads, alpha, theirs)
    if not _agree(ours, theirs, tolerance):
        return "combine"
    stepped = []
    for backend in (cuda, reference):
        params, averages, squares = tensors(3), tensors(4), [t.square() for t in tensors(5)]
        steps = [torch.tensor(3.0) for _ in params]
        backend.combine_adamw(params, grads, alpha, averages, squares, [], steps, **_OPTIONS)
        stepped.append([*params, *averages, *squares])
    return None if _agree(stepped[0], stepped[1], tolerance) else "combine_adamw"


def _of_split_rounding(device: torch.device, dtype: torch.dtype) -> str | None:
    """The float32 weights that two halves stand for show what the rounded ones would hide."""
    grads = [_waves(1, device, dtype), _waves(2, device, dtype)]
    alpha = torch.tensor([0.75, 0.5], dtype=torch.float64)
    stepped = []
    for backend in (cuda, reference):
        params = _waves(3, device, dtype)
        rounding = Rounding("split", [torch.zeros_like(p) for p in params])
        averages, squares = ([t.float() for t in _waves(k, device, dtype)] for k in (4, 5))
        steps = [torch.tensor(3.0) for _ in params]
        backend.combine_adamw(
            params,
            grads,
            alpha,
            averages,
            [t.square() for t in squares],
            [],
            steps,
            rounding,
            **_OPTIONS,
        )
        stepped.append([rounding.opened(p, k) for k, p in enumerate(params)])
    return None if _agree(stepped[0], stepped[1], 1e-5) else "combine_adamw, split"


def _of_a_layer(device: torch.device, dtype: torch.dtype) -> str | None:
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
        cuda.weight_grad(x, dy, _BOUNDS, U, ours, fresh)
        reference.weight_grad(x, dy, _BOUNDS, U, theirs, fresh)
        if not _agree([*ours], [*theirs], tolerance):
            return "weight_grad"
    return None


def _agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether no element is off by more than `tolerance` of the largest in its tensor."""
    return all(
        bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )
