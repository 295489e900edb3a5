"""How a run is spread over the processes that a launcher has started.

    torchrun --nproc-per-node 8 $(which raco-fast) train config.yaml

Without a launcher a run is one process: nothing here opens a process group or sends anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch

from raco_fast.distributed.processes import OtherProcessError
from raco_fast.dpo.data.choices import check_choices
from raco_fast.dpo.launch import Launch, launched


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
        if not 0 < self.timeout_seconds <= 1e8:  # a timedelta cannot be any length
            raise ValueError(
                f"`parallel.timeout_seconds` must be positive and at most 1e8, got "
                f"{self.timeout_seconds}"
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
        OtherProcessError: another process has ended, or has not answered in time.
    """
    launch = None if _is_open() else _launch_to_join(options)
    if launch is None:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _lost_ones_named(launch):
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=options.timeout_seconds),
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def _is_open() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _launch_to_join(options: ParallelOptions) -> Launch | None:
    """What the launcher says, checked; None for a run of one process that shards nothing."""
    launch = launched()
    if options.kind == "fsdp2":
        if launch is None:
            raise ValueError(
                "`parallel.kind` 'fsdp2' needs a launcher, which says how many processes there "
                "are; start with `torchrun --nproc-per-node N $(which raco-fast) train ...` (N may "
                "be 1), or leave `parallel` out to train on one process"
            )
        options.mesh_shape(launch.size)
    elif launch is None or launch.size == 1:
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(
                f"{name} must be set where WORLD_SIZE is ({launch.size} here): it is where the "
                f"processes meet; start them with torchrun, which sets it"
            )
    return launch


@contextmanager
def _lost_ones_named(launch: Launch) -> Iterator[None]:
    """Say that another process is gone, where the backend speaks of sockets."""
    try:
        yield
    except RuntimeError as error:
        ours = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not ours:
            raise
        raise OtherProcessError(
            f"process {launch.rank} of {launch.size} stops: another one has ended, or has not "
            f"answered within `parallel.timeout_seconds` ({error}); its own message is in its "
            f"output. Start again with --resume to go on from the last checkpoint"
        ) from error
