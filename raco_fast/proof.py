"""Proves the Triton kernels against the reference before they are used on a device.

Compilers, drivers and cards differ, and a kernel that is wrong on one of them trains a wrong model
without a sign. A few small tensors of odd sizes show it in the first step of a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from subprocess import CalledProcessError

import torch
from torch import Tensor
from triton import TritonError

from raco_fast import reference, triton_backend
from raco_fast.reference import AdamWOptions

_SIZES = (1, 37, 1031, 4099)
_OPTIONS: AdamWOptions = {
    "lr": 0.1,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-6,
    "weight_decay": 0.1,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


def disagreement(device: torch.device) -> str | None:
    """What the Triton kernels get wrong on this device, in words; None if nothing.

    `gram`, `combine` and `combine_adamw` of two objectives, float32 and bfloat16, against
    `reference.py`. Compiles seven kernels the first time on a machine; the random number
    generators are left alone.
    """
    for dtype in (torch.float32, torch.bfloat16):
        try:
            found = _disagreement(device, dtype)
        except (TritonError, CalledProcessError, RuntimeError, OSError) as error:
            # No compiler, no driver, out of resources: reported, and the reference can still run.
            return f"the kernels for {dtype} failed with {type(error).__name__}: {error}"
        if found is not None:
            return f"`{found}` of {dtype} tensors differs from plain torch"
    return None


def _disagreement(device: torch.device, dtype: torch.dtype) -> str | None:
    def tensors(phase: int) -> list[Tensor]:
        waves = [torch.arange(n, dtype=torch.float64).mul(0.7).add(phase).sin() for n in _SIZES]
        return [wave.to(device, dtype) for wave in waves]

    grads = [tensors(1), tensors(2)]
    alpha = torch.tensor([0.75, 0.5], dtype=torch.float64)
    ours: list[Tensor] = [triton_backend.gram(grads)]
    theirs: list[Tensor] = [reference.gram(grads)]
    if not _agree(ours, theirs, 1e-5):
        return "gram"
    tolerance = 4 * torch.finfo(dtype).eps
    ours, theirs = tensors(0), tensors(0)
    triton_backend.combine(grads, alpha, ours)
    reference.combine(grads, alpha, theirs)
    if not _agree(ours, theirs, tolerance):
        return "combine"
    stepped = []
    for backend in (triton_backend, reference):
        params, averages, squares = tensors(3), tensors(4), [t.square() for t in tensors(5)]
        steps = [torch.tensor(3.0) for _ in params]
        backend.combine_adamw(params, grads, alpha, averages, squares, [], steps, **_OPTIONS)
        stepped.append([*params, *averages, *squares])
    return None if _agree(stepped[0], stepped[1], tolerance) else "combine_adamw"


def _agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether no element is off by more than `tolerance` of the largest in its tensor."""
    return all(
        bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )
