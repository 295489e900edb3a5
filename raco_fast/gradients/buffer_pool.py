"""`HostMemory`: gradient buffers on the CPU reuse the memory that the step before has freed.

Large CPU tensors are mapped when they are made and unmapped when they die, so the m gradients of
every step pay for fresh pages: at m = 8 more than for their arithmetic. On CUDA devices torch's own
allocator keeps memory; this is the same for the CPU, for gradient buffers only.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

# Bytes from which keeping memory pays: malloc keeps smaller blocks by itself.
_WORTH_KEEPING = 1 << 20


class HostMemory:
    """Hands out CPU memory, and takes it back when the last tensor on it is gone.

    Of blocks large enough to be mapped by themselves it holds as much as was in use at one time,
    until it is itself dropped. A copy, or what is pickled of it, starts empty.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, as `torch.empty` on the CPU."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _WORTH_KEEPING:
            return torch.empty(shape, dtype=dtype)
        free = self._free[nbytes]
        block = free.pop() if free else torch.empty(nbytes, dtype=torch.uint8)
        lease = block.numpy()  # dies with the storage below, when the last tensor on it is gone
        finalize(lease, free.append, block).atexit = False
        storage = torch.from_numpy(lease).untyped_storage()
        found = torch.empty(0, dtype=dtype)
        found.set_(storage, 0, tuple(shape))  # type: ignore[call-overload]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return HostMemory, ()


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, memory: HostMemory
) -> Tensor:
    """Uninitialised memory, from `memory` on the CPU."""
    if device.type == "cpu":
        return memory.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
