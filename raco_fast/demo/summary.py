"""What the numbers say: mean and spread over seeds, and comparisons that know their own noise.

Models of one seed share their start, their preference pairs and their held-out documents, so two
rules are compared by their differences seed by seed. A difference is called clear when its 95 %
Student interval leaves out zero; everything else is called within the spread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raco_fast.demo.jobs import Judged
from raco_fast.studies import fronts
from raco_fast.studies.spread import Spread


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule with a Gram matrix at a weight vector, over all seeds.

    Args:
        rule: the rule, or "start" for the model before alignment.
        gram: "batch" or "unbiased"; None for the start.
        weights: in the order of the objectives; empty for a rule that ignores them.
        scores: objective -> judged score.
        metrics: those of a step that begin with raco/ -> mean over the steps in which it is finite;
            empty for the start.
        expected: "a:b" -> cosine between the objectives' expected gradients as it is estimated
            at the last step, of those of the pairs where every seed has an estimate; empty unless
            the Gram matrix is the unbiased one.
        skipped_steps: steps not taken, over all seeds.
    """

    rule: str
    gram: str | None
    weights: tuple[float, ...]
    scores: dict[str, Spread]
    metrics: dict[str, Spread]
    expected: dict[str, Spread]
    skipped_steps: int

    @property
    def clipped(self) -> Spread | None:
        """Share of steps in which clipping changed the update; None for the start."""
        return self.metrics.get("raco/clip_active")

    @property
    def cosines(self) -> dict[str, Spread]:
        """ "a:b" -> mean cosine between the gradients of a step; empty for the start."""
        return _below("raco/cosine/", self.metrics)

    @property
    def weights_text(self) -> str:
        """For example "0.64/0.16/0.2"; a dash for none."""
        return "/".join(f"{weight:.3g}" for weight in self.weights) or "-"

    @property
    def method(self) -> str:
        """How sentences call its rule and Gram matrix; the batch's, the paper's, goes unsaid."""
        return f"unbiased {self.rule}" if self.gram == "unbiased" else self.rule

    @property
    def name(self) -> str:
        """How sentences call this row."""
        return f"{self.method} at {self.weights_text}" if self.weights else self.method


def summarize(results: Sequence[Judged]) -> list[Row]:
    """The table: rules, Gram matrices and weight vectors, in the order of the results."""
    groups: dict[tuple[str, str | None, tuple[float, ...]], list[Judged]] = {}
    for result in results:
        weights = tuple(result.weights.values()) if result.weights else ()
        groups.setdefault((result.rule, result.gram, weights), []).append(result)
    rows = []
    for (rule, gram, weights), group in groups.items():
        scores = {name: Spread(tuple(r.scores[name] for r in group)) for name in group[0].scores}
        metrics = {
            name: Spread(tuple(_mean(step[name] for step in r.steps) for r in group))
            for name in group[0].steps[0]
            if name.startswith("raco/")
        }
        last = {k: Spread(tuple(r.steps[-1][k] for r in group)) for k in metrics}
        expected = _below("raco/cosine_unbiased/", last)
        expected = {pair: v for pair, v in expected.items() if math.isfinite(v.mean)}
        skipped = sum(round(r.steps[-1].get("raco/skipped_steps", 0)) for r in group)
        rows.append(Row(rule, gram, weights, scores, metrics, expected, skipped))
    return rows


def _below(prefix: str, metrics: dict[str, Spread]) -> dict[str, Spread]:
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def _mean(numbers: Iterable[float]) -> float:
    """Mean of those that are finite, NaN where none is."""
    finite = [number for number in numbers if math.isfinite(number)]
    return statistics.fmean(finite) if finite else math.nan


def dominates(a: Row, b: Row) -> bool:
    """Whether a's mean scores are nowhere below b's and somewhere above."""
    means = (np.array([score.mean for score in row.scores.values()]) for row in (a, b))
    return bool(fronts.dominates(*means))
