"""The clock and the memory of training steps, for loops that are ours and loops that are not."""

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
        self._cuda = device if device.type == "cuda" else None
        self._warmup = warmup
        self._before = torch.cuda.memory_allocated(device) if self._cuda else _status("VmRSS")
        self._seconds: list[float] = []
        self._began = 0.0

    def begin(self) -> None:
        if len(self._seconds) == self._warmup:
            if self._cuda:
                torch.cuda.reset_peak_memory_stats(self._cuda)
            else:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM = VmRSS
        self._wait()
        self._began = perf_counter()

    def end(self) -> None:
        self._wait()
        self._seconds.append(perf_counter() - self._began)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._cuda)

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
        peak = torch.cuda.max_memory_allocated(self._cuda) if self._cuda else _status("VmHWM")
        return peak - self._before


def _status(field: str) -> int:
    """Bytes in a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
