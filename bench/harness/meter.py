"""The clock and the memory of training steps, for loops that are ours and loops that are not."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import torch

from bench.harness.timing import Call


class Meter:
    """Seconds of each step after `warmup` of them, and the peak of memory during those.

    Args:
        device: where the steps run; on CUDA the host waits for it at both ends of a step.
        warmup: steps at the start that do not count.

    Memory is counted from the construction on, which belongs right behind the model's. On a CPU it
    is that of the resident set, and its peak VmHWM; on CUDA torch's `max_memory_allocated`.
    """

    def __init__(self, device: torch.device, warmup: int) -> None:
        self._device = device
        self._warmup = warmup
        self._before = self._held()
        self._seconds: list[float] = []
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        if len(self._seconds) == self._warmup:
            self._reset_peak()
        self._wait()
        self._began = perf_counter()

    def end(self) -> None:
        """The step is done."""
        self._wait()
        self._seconds.append(perf_counter() - self._began)

    def run(self, step: Call, times: int) -> None:
        """Take a step so many times."""
        for _ in range(times):
            self.begin()
            step()
            self.end()

    @property
    def seconds(self) -> list[float]:
        """Of each step that counts."""
        return self._seconds[self._warmup :]

    def peak(self) -> int:
        """Bytes above those held at the construction."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _status("VmHWM") - self._before

    def _held(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _status("VmRSS")

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM = VmRSS

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _status(field: str) -> int:
    """Bytes in a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
