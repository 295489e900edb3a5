"""One run of the benchmarks: where, how large, until when; and the loop that every suite shares.

For each case the contestants prove themselves on the very tensors that they are timed on, those
that are right are timed in turn, and each gets a record. What fails gets a record that says so.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

from bench.harness import correctness, machine
from bench.harness.cases import Case, cases
from bench.harness.contest import Contest, failures
from bench.harness.jobs import LEFT_OUT
from bench.harness.records import OURS, Records
from bench.harness.timing import Times, interleaved, shares

# A contestant that is further off than this computes something else.
_TOLERANCE = 0.1
# Memory besides the tensors of a case, for a truth in float64 and temporary copies.
_SLACK = 1 << 30


class Suite(Protocol):
    """A module of bench/suites that measures cases."""

    NAME: str

    def bytes_held(self, case: Case) -> int:
        """What has to fit in memory, without what rivals need besides."""

    def bytes_moved(self, case: Case) -> int:
        """What has to move at least."""

    def contest(self, case: Case, skip: Sequence[str]) -> Contest:
        """The contestants, all but those in `skip`."""


@dataclass
class Session:
    """Where records go, what is measured, and until when (by `perf_counter`)."""

    records: Records
    device: torch.device
    sizes: str
    until: float
    skip: tuple[str, ...] = ()

    def measure(self, suite: Suite) -> None:
        """Measure every case that there is memory and time for."""
        reason = correctness.obstacle(self.records.read(), self.device.type, suite.NAME)
        if reason is not None:
            self.records.add(f"{suite.NAME}/{OURS}", {}, failure=reason)
            return
        for case, until in shares(cases(self.sizes, self.device), self.until):
            gc.collect()
            needed = suite.bytes_held(case) + _SLACK
            if self.until <= perf_counter():
                self._fail(suite, case, OURS, LEFT_OUT)
            elif needed > (free := machine.free_memory(self.device)):
                shown = f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"
                self._fail(suite, case, OURS, f"left out: {shown}")
            else:
                try:
                    self._measure(suite, case, until)
                except failures() as failure:
                    self._fail(suite, case, OURS, _shown(failure))

    def _measure(self, suite: Suite, case: Case, until: float) -> None:
        contest = suite.contest(case, self.skip)
        errors: dict[str, float] = {}
        for name in contest.calls:
            try:
                error = contest.error(name)
            except failures() as failure:
                self._fail(suite, case, name, _shown(failure))
                continue
            limit = contest.tolerance if name == OURS else _TOLERANCE
            if error <= limit:
                errors[name] = error
            else:
                self._fail(suite, case, name, f"wrong: error {error:.2g}, at most {limit:.2g}")
        if OURS in errors:
            calls = {name: contest.calls[name] for name in errors}
            self._add(suite, case, interleaved(calls, self.device, until), errors)

    def _add(
        self, suite: Suite, case: Case, times: dict[str, Times], errors: dict[str, float]
    ) -> None:
        moved, bandwidth = suite.bytes_moved(case), self.records.copy_bandwidth()
        ours = times[OURS].quantiles()[1]
        for name, taken in times.items():
            middle = taken.quantiles()[1]
            self.records.add(
                f"{suite.NAME}/{name}",
                case.params(),
                **taken.summary("ms", 1e3),
                wall=1e3 * median(taken.wall),
                ratio=middle / ours,
                bytes=moved,
                share=None if bandwidth is None else moved / middle / bandwidth,
                error=errors[name],
            )

    def _fail(self, suite: Suite, case: Case, name: str, failure: str) -> None:
        self.records.add(f"{suite.NAME}/{name}", case.params(), failure=failure)


def _shown(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"[:500]
