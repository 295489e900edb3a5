"""Tensors on their way from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, without waiting for what that is computing.

    A plain `.to(device)` of a tensor in ordinary memory waits until the GPU has done all it was
    given, so a step of many small ones keeps it idle. From pinned memory the copy takes its turn.
    """
    if x.device == device:
        return x
    if x.is_cpu and device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    # To the host it has to wait: the values would be read before they are there.
    return x.to(device, non_blocking=device.type != "cpu")
