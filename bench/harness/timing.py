"""Times of rivals that take turns, on a CUDA device or a CPU.

Two times per call. `wall` is what a caller waits: the host's clock around the call and a
synchronization. `device` is what the device needs once the host no longer holds it up: events
around the call, behind a pause of the device during which the host can issue the call's launches.
(The queue of launches is about a thousand deep: a rival with more of them is held up regardless.)
On a CPU the two are one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch

Call = Callable[[], object]
T = TypeVar("T")

# Pause in clock cycles: 2 ms at 2 GHz, more than the host work of any of our own operations.
_HEAD_START = 4_000_000
MIN_ROUNDS = 3
MAX_ROUNDS = 25


@dataclass
class Times:
    """Seconds of each round."""

    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def quantiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80 of the device's seconds."""
        low, middle, high = np.quantile(self.device, [0.2, 0.5, 0.8])
        return float(low), float(middle), float(high)

    def summary(self, unit: str = "s", per_second: float = 1.0) -> dict[str, Any]:
        """The quantiles as they stand in a record, in a unit of which a second has so many."""
        low, middle, high = (per_second * q for q in self.quantiles())
        return {"unit": unit, "p20": low, "p50": middle, "p80": high, "rounds": len(self.device)}


def interleaved(calls: dict[str, Call], device: torch.device, until: float) -> dict[str, Times]:
    """Time the calls in turn, so that whatever disturbs the machine hits them alike.

    Args:
        calls: name -> call; a first round warms up and is not counted.
        device: where they run.
        until: the `perf_counter` after which no round starts, once there are `MIN_ROUNDS`.
    """
    measure = _on_cuda if device.type == "cuda" else _on_cpu
    times = {name: Times() for name in calls}
    for number in range(MAX_ROUNDS + 1):
        if number > MIN_ROUNDS and perf_counter() > until:
            break
        for name, call in calls.items():
            on_device, wall = measure(call)
            if number:
                times[name].device.append(on_device)
                times[name].wall.append(wall)
    return times


def shares(todo: Sequence[T], until: float) -> Iterator[tuple[T, float]]:
    """Each thing to do, and the `perf_counter` at which its equal share of what is left is over."""
    for number, one in enumerate(todo):
        now = perf_counter()
        yield one, now + max(0.0, until - now) / (len(todo) - number)


def _on_cpu(call: Call) -> tuple[float, float]:
    started = perf_counter()
    call()
    seconds = perf_counter() - started
    return seconds, seconds


def _on_cuda(call: Call) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    started = perf_counter()
    call()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, perf_counter() - started
