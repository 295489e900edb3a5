"""What the numbers say: mean and spread over seeds, and comparisons that know their own noise.

Models of one seed share their start, their preference pairs and their held-out documents, so two
rules are compared by their differences seed by seed. A difference is called clear when its 95 %
Student interval leaves out zero; everything else is called within the spread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from raco_fast.demo.jobs import Aligned, WarmStart
from raco_fast.demo.judges import OBJECTIVES

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
CERTAINTY = 0.95
_COSINE = "raco/cosine/"


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

    def __str__(self) -> str:
        """Mean ± deviation; the mean alone for one seed."""
        return f"{self.mean:.3f}" + f" ± {self.deviation:.3f}" * (len(self.values) > 1)

    def interval(self) -> float:
        """Half width of the 95 % interval of the mean; infinite with one seed."""
        n = len(self.values)
        if n == 1:
            return math.inf
        # Beyond the table the last quantile is a little too wide, never too narrow.
        return _T95[min(n - 1, len(_T95)) - 1] * self.deviation / math.sqrt(n)

    def is_clear(self) -> bool:
        """Whether the 95 % interval of the mean leaves out zero."""
        return abs(self.mean) > self.interval()


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule at a weight vector, over all seeds.

    Args:
        rule: the rule, or "start" for the model before alignment.
        weights: in the order of the objectives; empty for a rule that ignores them.
        scores: objective -> judged score.
        clipped: share of steps in which clipping changed the update; None for the start.
        cosines: "a:b" -> mean cosine between the objectives' gradients; empty for the start.
        skipped_steps: steps not taken, over all seeds.
    """

    rule: str
    weights: tuple[float, ...]
    scores: dict[str, Spread]
    clipped: Spread | None
    cosines: dict[str, Spread]
    skipped_steps: int

    @property
    def weights_text(self) -> str:
        """For example "0.65/0.15/0.2"; a dash for none."""
        return "/".join(f"{weight:g}" for weight in self.weights) or "-"

    @property
    def name(self) -> str:
        """How sentences call this row."""
        return f"{self.rule} at {self.weights_text}" if self.weights else self.rule


def summarize(starts: Sequence[WarmStart], runs: Sequence[Aligned]) -> list[Row]:
    """The table: the start first, then every rule and weight vector in the order of the runs."""
    groups: dict[tuple[str, tuple[float, ...]], list[Aligned]] = {}
    for run in runs:
        weights = tuple(run.weights[name] for name in OBJECTIVES) if run.weights else ()
        groups.setdefault((run.rule, weights), []).append(run)
    rows = [Row("start", (), _scores(starts), None, {}, 0)]
    for (rule, weights), group in groups.items():
        names = [name for name in group[0].steps[0] if name.startswith(_COSINE)]
        cosines = {name.removeprefix(_COSINE): _over_steps(group, name) for name in names}
        skipped = sum(round(run.steps[-1]["raco/skipped_steps"]) for run in group)
        clipped = _over_steps(group, "raco/clip_active")
        rows.append(Row(rule, weights, _scores(group), clipped, cosines, skipped))
    return rows


def _scores(results: Sequence[WarmStart | Aligned]) -> dict[str, Spread]:
    return {name: Spread(tuple(r.scores[name] for r in results)) for name in OBJECTIVES}


def _over_steps(group: Sequence[Aligned], metric: str) -> Spread:
    """Each seed's mean of a metric over the steps in which it is finite."""
    means = []
    for run in group:
        finite = [step[metric] for step in run.steps if math.isfinite(step[metric])]
        means.append(statistics.fmean(finite) if finite else math.nan)
    return Spread(tuple(means))


def dominates(a: Row, b: Row) -> bool:
    """Whether a's mean scores are nowhere below b's and somewhere above."""
    differences = [a.scores[name].mean - b.scores[name].mean for name in OBJECTIVES]
    return min(differences) >= 0 and max(differences) > 0
