"""How a run is spread over the processes that a launcher has started, and how they stay together.

    torchrun --nproc-per-node 8 $(which raco-fast) train config.yaml

Without a launcher a run is one process: nothing here opens a process group or sends anything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
from torch import Tensor

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.choices import check_choices
from raco_fast.dpo.launch import launched

Result = TypeVar("Result")


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is held by several processes.

    Args:
        kind: ddp: every process holds the whole model; fsdp2: its parameters, gradients and
            optimizer state are sharded (torch's `fully_shard`).
        shard: of fsdp2: processes that share one copy of the model; None: all of them.
        replicate: of fsdp2: copies of the model, each sharded over `shard` processes; None: as
            many as there are processes for, one where `shard` is None too.
        cpu_offload: of fsdp2: keep shards and optimizer state in the CPU's memory.
        reshard: of fsdp2: free a layer's gathered weights after its forward pass, and gather them
            again for its backward pass. False takes the memory of the whole model and saves the
            second gathering.
        timeout_seconds: how long a process waits for another before it gives up.
    """

    kind: Literal["ddp", "fsdp2"] = "ddp"
    shard: int | None = None
    replicate: int | None = None
    cpu_offload: bool = False
    reshard: bool = True
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("shard", "replicate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`parallel.{name}` must be at least 1, got {value}")
        if not self.timeout_seconds > 0:
            raise ValueError(
                f"`parallel.timeout_seconds` must be positive, got {self.timeout_seconds}"
            )
        whole = ParallelOptions.__dataclass_fields__
        of_fsdp2 = ("shard", "replicate", "cpu_offload", "reshard")
        given = [name for name in of_fsdp2 if getattr(self, name) != whole[name].default]
        if self.kind == "ddp" and given:
            raise ValueError(
                f"`parallel.{given[0]}` is an option of `parallel.kind` 'fsdp2', got it with "
                f"'ddp', where every process holds the whole model; choose fsdp2 or leave it out"
            )

    def mesh_shape(self, size: int) -> tuple[int, int]:
        """(copies, processes that share one) of fsdp2 over `size` processes.

        Raises:
            ValueError: their product is another number.
        """
        shard = self.shard or max(1, size // (self.replicate or 1))
        replicate = self.replicate or max(1, size // shard)
        if replicate * shard != size:
            raise ValueError(
                f"`parallel.shard` times `parallel.replicate` must be the number of processes, "
                f"got {shard} x {replicate} for {size}; leave one of them out, or start "
                f"{shard * replicate} processes"
            )
        return replicate, shard


@contextmanager
def process_group(options: ParallelOptions, device: torch.device) -> Iterator[None]:
    """Connect the processes of a run for the length of the block, if a launcher has started any.

    A group that is open already is used as it is, and stays open.

    Args:
        device: of the model: NCCL serves a GPU, gloo the CPU and all small numbers.
    Raises:
        ValueError: the launcher's variables are incomplete; fsdp2 without a launcher, or with
            another number of processes than `options` divide the model over.
        OSError: another process has ended, or has not answered in time.
    """
    launch = launched()
    if launch is None and not torch.distributed.is_initialized():
        if options.kind == "fsdp2":
            raise ValueError(
                "`parallel.kind` 'fsdp2' needs a launcher, which says how many processes there "
                "are; start with `torchrun --nproc-per-node N $(which raco-fast) train ...` (N may "
                "be 1), or leave `parallel` out to train on one process"
            )
        yield
        return
    alone = launch is not None and launch.size == 1 and options.kind == "ddp"
    if alone or torch.distributed.is_initialized():
        yield
        return
    assert launch is not None
    if options.kind == "fsdp2":
        options.mesh_shape(launch.size)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(
                f"{name} must be set where WORLD_SIZE is ({launch.size} here): it is where the "
                f"processes meet; start them with torchrun, which sets it"
            )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _lost_ones_named(launch.rank, launch.size):
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=options.timeout_seconds),
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


class OtherProcessError(OSError):
    """Another process of the run has failed, or is gone, so this one stops as well."""


@contextmanager
def _lost_ones_named(rank: int, size: int) -> Iterator[None]:
    """Say that another process is gone, where the backend speaks of sockets."""
    try:
        yield
    except RuntimeError as error:
        ours = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not ours:
            raise
        raise OtherProcessError(
            f"process {rank} of {size} stops: another one has ended, or has not answered within "
            f"`parallel.timeout_seconds` ({error}); its own message is in its output. Start again "
            f"with --resume to go on from the last checkpoint"
        ) from error


def together(processes: Processes, act: Callable[[], Result]) -> Result:
    """What `act()` gives on each process; where it fails on one, all fail.

    Without this the others would wait in their next collective for one that has ended. `act` sends
    nothing itself.

    Raises:
        OSError, ValueError: as `act` on this process.
        OtherProcessError: it failed on another one (with its message).
    """
    failure: OSError | ValueError | None = None
    result: Result | None = None
    try:
        result = act()
    except (OSError, ValueError) as error:
        failure = error
    rank, size = processes.rank, processes.size
    said = processes.say(None if failure is None else f"process {rank} of {size}: {failure}")
    if failure is not None:
        raise failure
    if said is not None:
        raise OtherProcessError(said)
    return result  # type: ignore[return-value]


def by_first(processes: Processes, act: Callable[[], Result]) -> Result | None:
    """`act()` on the first process alone, such as writing a file; its failure is raised on all."""
    return together(processes, lambda: act() if processes.rank == 0 else None)


def gathered(processes: Processes, value: Result) -> list[Result]:
    """What every process has, in the order of their numbers; anything that can be pickled."""
    if processes.size == 1:
        return [value]
    values: list[Result | None] = [None] * processes.size
    torch.distributed.all_gather_object(values, value, group=processes.group)
    return values  # type: ignore[return-value]


def check_alike(processes: Processes, about: Mapping[str, object]) -> None:
    """Raise ValueError, naming what differs, where processes are about to do different runs.

    Args:
        about: what has to be equal, the same names in the same order on all.
    """
    digests = [list(hashlib.sha256(repr(value).encode()).digest()) for value in about.values()]
    rows = torch.tensor(digests, dtype=torch.float64)
    if processes.alike(rows):
        return
    differing = [name for name, row in zip(about, rows, strict=True) if not processes.alike(row)]
    raise ValueError(
        f"all processes of a run must have the same {', '.join(differing)}, got "
        f"{about[differing[0]]!r} on process {processes.rank} of {processes.size}; start all of "
        f"them with the same config, data, model and `output_dir`"
    )


def average_gradients(processes: Processes, parameters: Iterable[Tensor]) -> None:
    """Replace every p.grad by its mean over processes that hold whole, equal parameters.

    They are sent in buckets of about 25 MB: an adapter's gradients are many and small. All
    processes have a gradient for the same parameters.
    """
    buckets: dict[torch.dtype, list[list[Tensor]]] = {}
    for grad in (p.grad for p in parameters if p.grad is not None):
        of_dtype = buckets.setdefault(grad.dtype, [[]])
        if sum(g.nbytes for g in of_dtype[-1]) + grad.nbytes > _BUCKET and of_dtype[-1]:
            of_dtype.append([])
        of_dtype[-1].append(grad)
    for bucket in (bucket for of_dtype in buckets.values() for bucket in of_dtype):
        mean = processes.sum(torch.cat([g.flatten() for g in bucket])) / processes.size
        for grad, part in zip(bucket, torch.split(mean, [g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


_BUCKET = 25 << 20  # bytes
