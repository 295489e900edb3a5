"""Fronts measured: hypervolume of each seed, distances to rays, and two rules against each other.

A seed's front is made of that seed's runs, so that an interval over seeds says how far another
training would move the number. Two rules are compared run by run: the same seed, the same weights.
Their bootstrap draws seeds and settings anew, both with replacement, the same for both rules; that
of a hypervolume draws seeds alone, as a front of fewer points is another front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from raco_fast.studies.fronts import (
    Points,
    epsilon_additive,
    hypervolume,
    ray_distance,
)
from raco_fast.studies.groups import Group, Point, Study
from raco_fast.studies.spread import CERTAINTY, Spread


@dataclass(frozen=True)
class Estimate:
    """A difference and the 95 % percentile interval of its bootstrap; NaN where there is none."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """The difference with its interval, where there is one."""
        known = not math.isnan(self.low)
        return f"{self.mean:+.4f}" + f" [{self.low:+.4f}, {self.high:+.4f}]" * known


@dataclass(frozen=True)
class Comparison:
    """One group against another, over the seeds that all points of both have.

    Args:
        seeds: how many those are.
        points: how many settings both have.
        gains: objective -> how much better the first is, over those points and seeds; empty where
            they have none in common.
        hypervolume: how much larger that of the first is; None without a common seed.
        epsilon: of the first over the second, and of the second over the first, one a seed.
    """

    first: str
    second: str
    seeds: int
    points: int
    gains: Mapping[str, Estimate]
    hypervolume: Estimate | None
    epsilon: tuple[Spread, Spread] | None


def hypervolumes(group: Group, study: Study) -> Spread | None:
    """Of each seed's front; None where no seed has all points."""
    if not group.seeds:
        return None
    return Spread(tuple(hypervolume(group.at(seed), study.reference) for seed in group.seeds))


def ray_distances(point: Point, study: Study) -> Spread | None:
    """How far a point is beside the ray of its weights, one a seed; None where it has none."""
    if point.ray is None:
        return None
    rays = (ray_distance(v, study.reference, point.ray) for v in point.values.values())
    return Spread(tuple(rays))


def compared_groups(study: Study, resamples: int, seed: int) -> list[Comparison]:
    """Every two groups."""
    return [_compared(a, b, study, resamples, seed) for a, b in combinations(study.groups, 2)]


def _compared(a: Group, b: Group, study: Study, resamples: int, seed: int) -> Comparison:
    seeds = sorted({*a.seeds} & {*b.seeds})
    ours, theirs = ({point.key: point for point in group.points} for group in (a, b))
    keys = [key for key in ours if key in theirs]
    if not seeds:
        return Comparison(a.name, b.name, 0, len(keys), {}, None, None)
    rng, most = np.random.default_rng(seed), max(len(keys), len(seeds))
    of_settings, of_seeds = (_shares(rng, n, resamples) for n in (len(keys), len(seeds)))
    gains = {}
    if keys:
        by_run = np.array(
            [[ours[key].values[s] - theirs[key].values[s] for s in seeds] for key in keys]
        )
        means = np.einsum("bp,bs,psm->bm", of_settings, of_seeds, by_run)
        for k, name in enumerate(study.objectives):
            gains[name] = _estimate(float(by_run[..., k].mean()), means[:, k], most)
    one, other = ([hypervolume(g.at(s), study.reference) for s in seeds] for g in (a, b))
    gain = np.subtract(one, other, dtype=np.float64)
    volume = _estimate(float(gain.mean()), of_seeds @ gain, len(seeds))
    epsilon = (
        Spread(tuple(epsilon_additive(a.at(s), b.at(s)) for s in seeds)),
        Spread(tuple(epsilon_additive(b.at(s), a.at(s)) for s in seeds)),
    )
    return Comparison(a.name, b.name, len(seeds), len(keys), gains, volume, epsilon)


def _shares(rng: np.random.Generator, n: int, resamples: int) -> Points:
    """[resamples, n] how often each of n is drawn, of n draws with replacement, over n."""
    return rng.multinomial(n, [1 / n] * n, size=resamples) / n if n else np.zeros((resamples, 0))


def _estimate(mean: float, resampled: Points, most: int) -> Estimate:
    """With its percentile interval; without one where there is nothing else to draw.

    Args:
        most: the settings or seeds that were drawn from, whichever are more.
    """
    if most < 2:
        return Estimate(mean, math.nan, math.nan)
    tail = 50 * (1 - CERTAINTY)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(mean, float(low), float(high))
