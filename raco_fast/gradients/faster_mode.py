"""`FasterMode`: whether one backward pass or m of them take less time, found by trying both."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raco_fast.distributed.processes import Processes

logger = logging.getLogger(__name__)

MODES = ("one_backward", "autograd")
# Calls of each that are timed; the fastest counts, for the first ones are also spot checks.
_TRIALS = 4


class FasterMode:
    """The two modes take turns at first, then the faster one is kept.

    Gradients are exact either way, but not to the bit: runs that have chosen differently differ by
    rounding.

    Args:
        processes: the slowest one counts, so that all choose alike.

    Attributes:
        kept: the mode chosen, None as long as both are tried.
    """

    def __init__(self, processes: Processes) -> None:
        self.kept: str | None = None
        self._processes = processes
        self._seconds: dict[str, list[float]] = {mode: [] for mode in MODES}

    @contextmanager
    def mode(self, device: torch.device) -> Iterator[str]:
        """The mode that the backward pass in the block is to take."""
        if self.kept is not None:
            yield self.kept
            return
        mode = min(MODES, key=lambda mode: len(self._seconds[mode]))
        start = _now(device)
        yield mode
        self._seconds[mode].append(_now(device) - start)
        if all(len(timed) == _TRIALS for timed in self._seconds.values()):
            self._choose()

    def _choose(self) -> None:
        fastest = torch.tensor([min(self._seconds[mode]) for mode in MODES], dtype=torch.float64)
        one, each = self._processes.largest(fastest).tolist()
        self.kept = MODES[0] if one <= each else MODES[1]
        logger.info(
            "mode='auto' keeps %r: a backward pass for all objectives took %.2g s, one for each "
            "%.2g s",
            self.kept,
            one,
            each,
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
