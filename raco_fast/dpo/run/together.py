"""What the processes of a run do together, so that none waits for one that has stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from raco_fast.distributed.processes import OtherProcessError, Processes

Result = TypeVar("Result")


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
