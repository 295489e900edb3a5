"""What of a DTensor lies on this process, and how often the processes hold it between them.

A step needs no more: kernels take local shards as they are, and an inner product over the whole
tensor is a sum over processes of local ones, each weighed by how often its elements are counted.
FSDP2, HSDP, tensor parallelism, their combinations and replicated DTensors differ in nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(t: object) -> TypeGuard[DTensor]:
    """Whether t is a DTensor; none exists before somebody has imported them."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether some tensor is a DTensor; asked often, of hundreds of them."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    kinds = set(map(type, tensors)) if module is not None else ()
    return any(issubclass(kind, module.DTensor) for kind in kinds)


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


def share(p: DTensor, size: int) -> float:
    """How much a local product of p counts in the sum over `size` processes.

    Each element lies on size / (number of shards) of them.
    """
    shards = 1
    for dimension, placement in enumerate(p.placements):
        if not placement.is_replicate():
            shards *= p.device_mesh.size(dimension)
    return shards / size


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether the same elements of two tensors of one shape lie on this process."""
    if not is_dtensor(a) or not is_dtensor(b):
        return is_dtensor(a) == is_dtensor(b)
    # A mesh from a file may differ from this process's in more than its ranks.
    return a.placements == b.placements and torch.equal(a.device_mesh.mesh, b.device_mesh.mesh)


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


def smaller_mesh(p: DTensor, size: int) -> DeviceMesh | None:
    """p's mesh where it is not all of the `size` processes: others hold copies of the shards."""
    return None if p.device_mesh.size() == size else p.device_mesh


def check_meshes(params: Sequence[Tensor], size: int) -> None:
    """Raise ValueError unless shards lie equally often on the `size` processes, and here as well.

    Otherwise products of gradients would be counted wrongly.
    """
    for p in params if any_dtensor(params) else ():
        mesh = p.device_mesh if is_dtensor(p) else None
        if mesh is None or (mesh.get_coordinate() is not None and size % mesh.size() == 0):
            continue
        raise ValueError(
            f"`process_group` must be the processes that hold a part of every parameter, got "
            f"{size} processes for a DTensor of shape {list(p.shape)} on a mesh of {mesh.size()}; "
            f"give the group of that mesh, mesh.get_group(). Pipeline parallelism is not "
            f"supported: the Gram matrix needs every parameter's gradients"
        )
