"""Language models whose parameters torch's `fully_shard` (FSDP2) has cut over processes.

Nothing here imports torch.distributed's sharding for a model that is not sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn


def shard(
    model: nn.Module,
    layers: list[nn.Module],
    device: torch.device,
    mesh_shape: tuple[int, int],
    *,
    cpu_offload: bool,
    reshard: bool,
) -> None:
    """Cut a model's parameters over the processes of the default group, in place.

    Args:
        layers: its decoder layers, each gathered when it runs; the rest is gathered at once.
        device: where it computes. The model itself may be on the CPU: it is moved layer by layer,
            so that no GPU ever holds all of it.
        mesh_shape: (copies, processes that share one).
        cpu_offload, reshard: as in `ParallelOptions`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    names, shape = ("replicate", "shard"), mesh_shape
    if mesh_shape[0] == 1:
        names, shape = names[1:], shape[1:]  # type: ignore[assignment]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    policy = offload if cpu_offload else OffloadPolicy()
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been called on it."""
    # Where nobody has loaded this module there is no such model.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def as_forward(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with `model` as its first argument, run as the forward pass of a sharded model.

    Only inside of its forward pass are the parameters of a sharded model gathered.
    """
    if not is_sharded(model):
        return partial(function, model)
    # With its module: padded and packed rows are scored by functions of one name.
    name = "_raco_" + f"{function.__module__}_{function.__name__}".replace(".", "_")
    if name not in vars(model):
        from torch.distributed.fsdp import register_fsdp_forward_method

        setattr(model, name, MethodType(function, model))
        register_fsdp_forward_method(model, name)
    method: Callable[..., Any] = getattr(model, name)
    return method


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: that of its parameters, unless they are offloaded."""
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.device_type != "cuda":
        return parameter.device
    return torch.device(
        mesh.device_type, torch.get_device_module(mesh.device_type).current_device()
    )


def free_gathered(model: nn.Module) -> None:
    """Give back what forward passes without a backward pass have gathered and kept.

    Otherwise the parameters would not be the optimizer's, but whole and without a gradient.
    """
    if is_sharded(model):
        for module in model.modules():
            if is_sharded(module):
                module.reshard()  # type: ignore[operator]


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter of a sharded model, whole in the CPU's memory of the first process.

    They are gathered one by one, so a GPU holds one of them at a time; the others get none. All
    processes have to ask. Tied parameters are there once, as in a file that transformers writes.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    whole = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    once = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in whole.items() if name not in again}


def cut_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of `whole`, as `parameter` is cut; `whole` where it is not cut.

    `whole` has the parameter's shape and is the same on all processes; nothing is sent.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    here = whole.to(parameter.device)
    return distribute_tensor(here, mesh, parameter.placements, src_data_rank=None)
