"""The numbers of a step on their way between host and device, in as few copies as can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from raco_fast.backends.rounding import Rounding
from raco_fast.kernels.tables import to_device, upload

if TYPE_CHECKING:
    from raco_fast.backends.reference import AdamWOptions


def hyper_rows(t: float | Tensor, n: int, options: AdamWOptions) -> Tensor:
    """The numbers of a step, one row per tensor: [n, 8] float32, columns `combine_adamw.HYPER`.

    They are computed in float64, on the device where the step counts or lr and betas are: on the
    CPU for free, on the GPU without waiting for it.

    Args:
        t: the tensors' step counts [n], already advanced, or the one that they all have.
        n: the number of tensors.
        options: of their group.
    """
    lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
    places = [x.device for x in (t, lr, beta1, beta2) if isinstance(x, Tensor)]
    device = next((place for place in places if place.type == "cuda"), torch.device("cpu"))
    t = t.to(device, torch.float64) if isinstance(t, Tensor) else t

    def number(x: float | Tensor) -> float | Tensor:
        # A copy of a CPU tensor to the device would wait for it; torch reads such a number too.
        if isinstance(x, Tensor):
            return float(x) if x.is_cpu else x.to(device, torch.float64)
        return x

    lr, beta1, beta2 = number(lr), number(beta1), number(beta2)
    columns = [
        lr / (1 - beta1**t),
        lr * options["weight_decay"],
        1 - beta1,
        1 - beta2,
        (1 - beta2**t) ** -0.5,
        options["eps"],
        -1.0 if options["maximize"] else 1.0,
        t,
    ]
    if not any(isinstance(column, Tensor) for column in columns):
        return torch.tensor(columns, dtype=torch.float32).repeat(n, 1)
    rows = torch.empty(n, len(columns), dtype=torch.float64, device=device)
    for i, column in enumerate(columns):
        rows[:, i] = column
    return rows.float()


def to_host(values: Tensor) -> Tensor:
    """A CPU copy, with the one wait of a step: for this stream, not for the device."""
    if not values.is_cuda:
        return values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return copy


def sent_together(rows: Tensor, shared: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both on the device, in one copy."""
    sent = to_device(torch.cat([rows.flatten(), shared.to(rows.device)]), device)
    return sent[: rows.numel()].view_as(rows), sent[rows.numel() :]


def seed_of(rounding: Rounding, device: torch.device) -> Tensor:
    """On the device: int64 [1]. It stays the same from step to step, as the bits do not."""
    return upload(np.array([rounding.seed & 0xFFFFFFFF]), device)
