"""One run of the benchmarks: where, how large, until when; and the loop that every suite shares.

For each case the contestants are checked on the tensors that they are timed on, those that are
right are timed in turn, and each gets a record. What fails gets a record that says so.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from types import ModuleType

import torch

from bench.harness import machine
from bench.harness.cases import Case, cases
from bench.harness.contest import failures
from bench.harness.jobs import LEFT_OUT
from bench.harness.records import OURS, Records
from bench.harness.timing import interleaved, shares

# A contestant that is further off than this computes something else.
_TOLERANCE = 0.1
# Memory besides the tensors of a case, for a truth in float64 and temporary copies.
_SLACK = 1 << 30


@dataclass
class Session:
    """Where records go, what is measured, and until when (by `perf_counter`)."""

    records: Records
    device: torch.device
    sizes: str
    until: float
    skip: tuple[str, ...] = ()

    def measure(self, suite: ModuleType) -> None:
        """Measure every case that there is memory and time for.

        Args:
            suite: a module with NAME and `contest`, and as arguments of `Case.bytes` HELD, what has
                to fit in memory without what rivals need besides, and MOVED, what has to move.
        """
        name = f"{suite.NAME}/{OURS}"
        for case, until in shares(cases(self.sizes, self.device), self.until):
            gc.collect()
            needed, free = case.bytes(*suite.HELD) + _SLACK, machine.free_memory(self.device)
            if self.until <= perf_counter():
                self.records.add(name, case.params(), failure=LEFT_OUT)
            elif needed > free:
                shown = f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"
                self.records.add(name, case.params(), failure=f"left out: {shown}")
            else:
                with self._failures_of(name, case):
                    self._measure(suite, case, until)

    @contextmanager
    def _failures_of(self, name: str, case: Case) -> Iterator[None]:
        """What a contestant may raise becomes its record, and the others go on."""
        try:
            yield
        except failures() as failure:
            shown = f"{type(failure).__name__}: {failure}"[:500]
            self.records.add(name, case.params(), failure=shown)

    def _measure(self, suite: ModuleType, case: Case, until: float) -> None:
        contest, params, errors = suite.contest(case, self.skip), case.params(), {}
        for name in contest.calls:
            limit = contest.tolerance if name == OURS else _TOLERANCE
            with self._failures_of(f"{suite.NAME}/{name}", case):
                error = contest.error(name)
                if error <= limit:
                    errors[name] = error
                    continue
                wrong = f"wrong: error {error:.2g}, at most {limit:.2g}"
                self.records.add(f"{suite.NAME}/{name}", params, failure=wrong)
        if OURS not in errors:
            return
        times = interleaved({name: contest.calls[name] for name in errors}, self.device, until)
        moved, bandwidth = case.bytes(*suite.MOVED), self.records.copy_bandwidth()
        ours = times[OURS].quantiles()[1]
        for name, taken in times.items():
            middle = taken.quantiles()[1]
            self.records.add(
                f"{suite.NAME}/{name}",
                params,
                **taken.summary("ms", 1e3),
                wall=1e3 * median(taken.wall),
                ratio=middle / ours,
                bytes=moved,
                share=None if bandwidth is None else moved / middle / bandwidth,
                error=errors[name],
            )
