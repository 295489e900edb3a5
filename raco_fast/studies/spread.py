"""A number measured once a seed: its mean, its spread, and whether it is clearly not zero."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

CERTAINTY = 0.95
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


@dataclass(frozen=True)
class Spread:
    """One number per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds; 0 with one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __sub__(self, other: Spread) -> Spread:
        """The difference seed by seed."""
        return Spread(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def interval(self) -> float:
        """Half width of the 95 % interval of the mean; infinite with one seed."""
        n = len(self.values)
        if n == 1:
            return math.inf
        # Beyond the table the last quantile is a little too wide, never too narrow.
        return _T95[min(n - 1, len(_T95)) - 1] * self.deviation / math.sqrt(n)

    def with_interval(self) -> str:
        """Mean ± half width of its 95 % interval; the mean alone for one seed."""
        return f"{self.mean:.4f}" + f" ± {self.interval():.4f}" * (len(self.values) > 1)

    def is_clear(self) -> bool:
        """Whether the 95 % interval of the mean leaves out zero."""
        return abs(self.mean) > self.interval()
