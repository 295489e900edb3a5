"""The front of each rule and Gram matrix as one number a seed, and which can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from raco_fast.demo.summary import Row
from raco_fast.studies.fronts import hypervolume
from raco_fast.studies.spread import Spread


@dataclass(frozen=True)
class Front:
    """The rows of a rule with one Gram matrix: its weight vectors, or one row without weights.

    Args:
        rule: the rule.
        gram: "batch" or "unbiased".
        method: what sentences call both.
        weights: of its rows. A front of other weights, or of more, has another volume for that
            reason alone.
        volume: the hypervolume above the worst scores there are, 0 in every objective, of each
            seed's rows; in [0, 1].
    """

    rule: str
    gram: str | None
    method: str
    weights: frozenset[tuple[float, ...]]
    volume: Spread


def fronts_of(aligned: Sequence[Row]) -> list[Front]:
    """One for each rule and Gram matrix, in the order of the rows."""
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in aligned:
        groups.setdefault((row.rule, row.gram), []).append(row)
    return [
        Front(rule, gram, rows[0].method, frozenset(row.weights for row in rows), _volume(rows))
        for (rule, gram), rows in groups.items()
    ]


def comparable(fronts: Sequence[Front]) -> Iterator[tuple[Front, Front]]:
    """Every two fronts of the same weights, the later one first."""
    for one, other in combinations(fronts, 2):
        if one.weights == other.weights:
            yield other, one


def _volume(rows: Sequence[Row]) -> Spread:
    by_seed = np.array([[score.values for score in row.scores.values()] for row in rows])
    points = np.moveaxis(by_seed, 2, 0)  # [seeds, n, m]
    worst = np.zeros(points.shape[2])
    return Spread(tuple(hypervolume(of_seed, worst) for of_seed in points))
