"""What of a DTensor lies on this process, and how often the processes hold it between them.

A step needs no more: kernels take local shards as they are, and an inner product over the whole
tensor is a sum over processes of local ones, each weighed by how often its elements are counted.
FSDP2, HSDP, tensor parallelism, their combinations and replicated DTensors differ in nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from raco_fast.distributed.processes import Processes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(t: object) -> TypeGuard[DTensor]:
    """Whether t is a DTensor; none exists before somebody has imported them."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of t that lies on this process: t itself unless it is a DTensor. Memory is shared.

    Waits for a collective that is still to fill it.
    """
    if not is_dtensor(t):
        return t
    if torch.is_grad_enabled():
        with torch.no_grad():
            return local(t)
    part: Any = t.to_local()
    wait = getattr(part, "wait", None)
    return part if wait is None else wait()  # type: ignore[no-any-return]


def share(p: Tensor, size: int) -> float:
    """How much a local product of p counts in the sum over `size` processes.

    Each element lies on size / (number of shards) of them.
    """
    if not is_dtensor(p):
        return 1.0 / size
    shards = 1
    for dimension, placement in enumerate(p.placements):
        if not placement.is_replicate():
            shards *= p.device_mesh.size(dimension)
    return shards / size


def placed_like(grad: Tensor, p: Tensor) -> Tensor:
    """A gradient with the placements of its parameter.

    Norms under sequence parallelism see some tokens each: their gradients are partial sums.
    """
    if not is_dtensor(grad) or not is_dtensor(p) or grad.placements == p.placements:
        return grad
    with torch.no_grad():
        return grad.redistribute(placements=p.placements)


def from_local(part: Tensor, p: DTensor) -> DTensor:
    """A DTensor that lies like p, of which `part` is what lies here."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def check_meshes(params: Iterable[Tensor], processes: Processes) -> None:
    """Raise unless every DTensor lies on all of the processes.

    Raises:
        ValueError: one has another mesh; the products of its gradients would be counted wrongly.
    """
    for p in params:
        if is_dtensor(p) and p.device_mesh.size() != processes.size:
            raise ValueError(
                f"`process_group` must be the processes that hold a part of every parameter, got "
                f"{processes.size} processes for a DTensor of shape {list(p.shape)} on a mesh of "
                f"{p.device_mesh.size()}. Where the others train on other data, let "
                f"fully_shard(mesh=...) span all of them; independent meshes are groups of their "
                f"own: process_group=mesh.get_group(). Pipeline parallelism is not supported: the "
                f"Gram matrix needs every parameter's gradients"
            )
