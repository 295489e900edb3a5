"""The front of each rule and Gram matrix as one number a seed, and which can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from raco_fast.demo.judges import OBJECTIVES
from raco_fast.demo.summary import Row
from raco_fast.studies.fronts import hypervolume
from raco_fast.studies.spread import Spread

REFERENCE = np.zeros(len(OBJECTIVES))
"""The worst scores there are: every summary is above them, whatever it was traded for."""


@dataclass(frozen=True)
class Front:
    """The rows of a rule with one Gram matrix: its weight vectors, or one row without weights.

    Args:
        rule: the rule.
        gram: "batch" or "unbiased".
        method: what sentences call both.
        weights: of its rows. A front of other weights, or of more, has another volume for that
            reason alone.
        volume: the hypervolume above `REFERENCE`, in [0, 1], of each seed's rows.
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
    by_seed = np.array([[row.scores[name].values for name in OBJECTIVES] for row in rows])
    points = np.moveaxis(by_seed, 2, 0)  # [seeds, n, m]
    return Spread(tuple(hypervolume(of_seed, REFERENCE) for of_seed in points))
