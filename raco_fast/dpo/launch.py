"""What a launcher (torchrun, accelerate launch) tells the processes that it starts.

It tells them in environment variables; without a launcher there are none, and a run is one process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """This process among those of a run.

    Args:
        rank: its number, from 0.
        size: how many there are, on all machines.
        local_rank: its number on this machine, which is its GPU's.
    """

    rank: int
    size: int
    local_rank: int


def launched() -> Launch | None:
    """What the launcher says; None without one.

    Raises:
        ValueError: only some of the variables are set, or one is not a number in its range.
    """
    if "WORLD_SIZE" not in os.environ:
        return None
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if rank >= size:
        raise ValueError(
            f"RANK must be below WORLD_SIZE, got {rank} and {size}; start the processes with "
            f"torchrun, which numbers them"
        )
    if size == 1 and "LOCAL_RANK" not in os.environ:
        return Launch(rank, size, 0)
    return Launch(rank, size, _number("LOCAL_RANK", 0))


def share_of_cores() -> int:
    """The cores that this process may use, shared with the run's other processes on this machine.

    Raises:
        ValueError: as `launched`.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    launch = launched()
    if launch is None:
        return cores
    here = _number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else launch.size
    return max(cores // here, 1)


def _number(name: str, least: int) -> int:
    text = os.environ.get(name)
    if text is None:
        raise ValueError(
            f"{name} must be set where WORLD_SIZE is (it is {os.environ['WORLD_SIZE']!r} here), or "
            f"every process would be the same one; start them with torchrun, which sets all, or "
            f"unset WORLD_SIZE for a run of one process"
        )
    if not text.isdecimal() or int(text) < least:
        raise ValueError(
            f"{name} must be a number, at least {least}, got {text!r}; it is set by the launcher: "
            f"start the processes with torchrun"
        )
    return int(text)
