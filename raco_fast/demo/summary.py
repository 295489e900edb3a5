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
from itertools import combinations

from raco_fast.demo.judges import OBJECTIVES
from raco_fast.demo.results import Aligned, WarmStart

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
CERTAINTY = 0.95


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

    def is_clear(self) -> bool:
        """Whether the 95 % interval of the mean leaves out zero."""
        return abs(self.mean) > self.interval()


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule at a weight vector, over all seeds.

    Args:
        rule: the rule, or "start" for the model before alignment.
        weights: objective -> weight, or None.
        scores: objective -> judged score.
        clip_active: share of steps in which clipping changed the update; None for the start.
        cosines: "a:b" -> mean cosine between the objectives' gradients; empty for the start.
        skipped_steps: steps not taken, over all seeds.
    """

    rule: str
    weights: dict[str, float] | None
    scores: dict[str, Spread]
    clip_active: Spread | None
    cosines: dict[str, Spread]
    skipped_steps: int

    @property
    def name(self) -> str:
        """How sentences call this row."""
        return self.rule if self.weights is None else f"{self.rule} at {weights_name(self.weights)}"


def weights_name(weights: dict[str, float] | None) -> str:
    """Weights in the order of the objectives, e.g. "0.65/0.15/0.2"; a dash for none."""
    return "-" if weights is None else "/".join(f"{weights[name]:g}" for name in OBJECTIVES)


def summarize(starts: Sequence[WarmStart], runs: Sequence[Aligned]) -> list[Row]:
    """The table: the start first, then every rule and weight vector in the order of the runs."""
    rows = [Row("start", None, _scores(starts), None, {}, 0)]
    groups: dict[tuple[str, str], list[Aligned]] = {}
    for run in runs:
        groups.setdefault((run.rule, weights_name(run.weights)), []).append(run)
    pairs = [f"{a}:{b}" for a, b in combinations(OBJECTIVES, 2)]
    for group in groups.values():
        rows.append(
            Row(
                group[0].rule,
                group[0].weights,
                _scores(group),
                _over_steps(group, "raco/clip_active"),
                {pair: _over_steps(group, f"raco/cosine/{pair}") for pair in pairs},
                sum(run.skipped_steps for run in group),
            )
        )
    return rows


def _scores(results: Sequence[WarmStart] | Sequence[Aligned]) -> dict[str, Spread]:
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
