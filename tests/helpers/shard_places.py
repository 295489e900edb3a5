"""What `place_of` says of DTensors, on four processes: `python shard_places.py RANK STORE`.

Prints a JSON line: case -> [offset, width, pitch, elements] of this process's shard. The truth is a
DTensor whose values are its elements' numbers. Each case's bfloat16 twin also takes a step, which
must be that of the whole tensor, to the bit.
"""

import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from raco_fast.backends import ops
from raco_fast.backends.rounding import Place, Rounding
from raco_fast.backends.types import AdamWOptions, Update
from raco_fast.distributed.shards import place_of

WORLD = 4
NUMBER = 7


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def distributed_cases(line: DeviceMesh, square: DeviceMesh) -> Iterator[tuple[str, DTensor]]:
    for name, mesh, shape, placements in [
        ("rows", line, (10, 6), [Shard(0)]),
        ("rows, the last process without any", line, (3, 5), [Shard(0)]),
        ("vector", line, (7,), [Shard(0)]),
        ("scalar", line, (), [Replicate()]),
        ("replicas", line, (5, 3), [Replicate()]),
        ("columns", line, (6, 10), [Shard(1)]),
        ("columns, the last process without any", line, (4, 3), [Shard(-1)]),
        ("third dimension", line, (2, 3, 9, 2), [Shard(2)]),
        ("rows and columns", square, (7, 9), [Shard(0), Shard(1)]),
        ("columns and rows", square, (7, 9), [Shard(1), Shard(0)]),
        ("rows of replicas' columns", square, (4, 6), [Replicate(), Shard(1)]),
        ("rows of rows", square, (11, 3), [Shard(0), Shard(0)]),
        ("first and third dimension", square, (5, 3, 4), [Shard(0), Shard(2)]),
    ]:
        yield name, distribute_tensor(numbered(*shape), mesh, placements)


def wrapped_cases(square: DeviceMesh) -> Iterator[tuple[str, DTensor]]:
    """Parameters as the wrappers of torch leave them."""

    def model() -> nn.Sequential:
        layers = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 5)).double()
        for p in layers.parameters():
            p.data.copy_(numbered(*p.shape))
        return layers

    hsdp = model()
    fully_shard(hsdp, mesh=square)
    both = parallelize_module(
        model(), square["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()}
    )
    fully_shard(both, mesh=square["dp"])
    for kind, layers in [("HSDP", hsdp), ("FSDP2 x TP", both)]:
        for name, p in layers.named_parameters():
            assert isinstance(p, DTensor)
            yield f"{kind}, {name}", p


def refused_cases(line: DeviceMesh, square: DeviceMesh) -> Iterator[tuple[str, DTensor]]:
    yield "two more", distribute_tensor(numbered(1, 3, 4), square, [Shard(1), Shard(2)])
    yield "strided", DTensor.from_local(numbered(2, 3), line, [_StridedShard(0, split_factor=2)])
    yield "partial", DTensor.from_local(numbered(2, 3), line, [Partial()])
    yield "turned", DTensor.from_local(numbered(2, 3).t(), line, [Shard(0)])


def step(p: Tensor, g: Tensor, place: Place) -> Tensor:
    """A bfloat16 parameter after a step with stochastic rounding, as float64."""
    p, g = p.detach().clone().bfloat16(), g.detach().bfloat16()
    states = [torch.zeros_like(p) for _ in range(2)]
    how = Rounding("stochastic", seed=3, places=[place])
    update = Update([p], [[g]], *[[s] for s in states], [], [torch.zeros(())], AdamWOptions(), how)
    with torch.no_grad():
        ops.combine_adamw(update, torch.ones(1, dtype=torch.float64))
    return p.double()


def found_in(t: DTensor) -> list[int]:
    place, local = place_of(t, NUMBER), t.to_local().detach()
    numbers = local.flatten().long()
    assert torch.equal(place.elements(0, len(numbers), numbers.device), numbers), t.placements
    whole = numbered(*t.shape)
    stepped = step(whole, whole.cos(), Place(NUMBER)).flatten()
    assert torch.equal(step(local, local.cos(), place).flatten(), stepped[numbers])
    assert place.tensor == NUMBER
    return [place.offset, place.width, place.pitch, len(numbers)]


def report() -> dict[str, list[int] | str]:
    """Case -> place and number of elements, or the error's message."""
    line = init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    cases = [*distributed_cases(line, square), *wrapped_cases(square)]
    found: dict[str, list[int] | str] = {name: found_in(t) for name, t in cases}
    for name, t in refused_cases(line, square):
        try:
            found[name] = found_in(t)
        except ValueError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a look-up of the host's name may wait for ever
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[2]}",
        rank=int(sys.argv[1]),
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    print(json.dumps(report()))
    torch.distributed.destroy_process_group()
