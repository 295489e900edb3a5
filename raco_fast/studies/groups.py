"""Runs sorted into fronts: a group for each rule, a point for each setting, a value for each seed.

Values are turned so that more is better; `Study.shown` turns them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from raco_fast.dpo.run.identity import default_of
from raco_fast.settings.plain import shown
from raco_fast.studies.fronts import Points
from raco_fast.studies.outcomes import Outcome
from raco_fast.studies.pareto_config import METRICS, ParetoConfig
from raco_fast.studies.spread import Spread

# They make groups, repetitions and rays.
_APART = ("rule", "seed", "weights")


@dataclass(frozen=True)
class Point:
    """The runs of a group that differ in the seed alone.

    Args:
        label: its weights, and the other settings in which points differ.
        key: tells the same settings in another group; weights that a rule ignores are none.
        weights: [m] float64; None for a rule that ignores them.
        ray: the weights, where they stay the same over a run.
        values: seed -> [m] float64, more is better.
    """

    label: str
    key: str
    weights: Points | None
    ray: Points | None
    values: Mapping[int, Points]

    @property
    def mean(self) -> Points:
        """[m] the mean over its seeds."""
        mean: Points = np.mean([*self.values.values()], axis=0)
        return mean

    def spread(self, objective: int, sign: float = 1.0) -> Spread:
        """The values of an objective, by its place, one a seed; `sign` turns them."""
        return Spread(tuple(sign * float(value[objective]) for value in self.values.values()))


@dataclass(frozen=True)
class Group:
    """The points of a rule, and of a value of each setting that is asked to be told apart."""

    name: str
    points: Sequence[Point]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that every point has: the front of a seed that lacks one is another front."""
        common = reduce(set.intersection, ({*point.values} for point in self.points))
        return tuple(sorted(common))

    def at(self, seed: int) -> Points:
        """[n, m] the points of one of `seeds`."""
        return np.stack([point.values[seed] for point in self.points])

    @property
    def means(self) -> Points:
        """[n, m] the mean of each point over its seeds."""
        return np.stack([point.mean for point in self.points])


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        objectives: their names, in the order of every [m].
        sign: by which values were turned so that more is better.
        reference: [m], turned likewise.
        groups: by the order of their first run.
    """

    objectives: tuple[str, ...]
    sign: float
    reference: Points
    groups: Sequence[Group]

    def shown(self, values: Points) -> dict[str, float]:
        """Objective -> value [m] as the metric is."""
        return {n: self.sign * float(v) for n, v in zip(self.objectives, values, strict=True)}


def study_of(outcomes: Sequence[Outcome], config: ParetoConfig) -> Study:
    """Sort runs into groups and points.

    Raises:
        ValueError: one objective alone; `by` names no setting; two runs that differ in nothing that
            is learnt from; a reference point of other objectives.
    """
    objectives = tuple(outcomes[0].values)
    if len(objectives) < 2:
        raise ValueError(
            f"`runs` must have at least two objectives, got {list(objectives)}: one has no front; "
            f"their metrics.jsonl tell which run is the best"
        )
    sign = METRICS[config.metric].sign
    varying = _varying(outcomes)
    groups: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        name = ", ".join([outcome.rule, *(f"{n}={_of(outcome, n)}" for n in config.by)])
        others = _others(outcome, varying, config.by)
        key = json.dumps([outcome.weights, others], sort_keys=True)
        groups.setdefault(name, {}).setdefault(key, []).append(outcome)
    made = [
        Group(name, [_point(key, of, objectives, varying, config) for key, of in points.items()])
        for name, points in groups.items()
    ]
    reference = sign * np.array(config.reference_of(objectives), dtype=np.float64)
    return Study(objectives, sign, reference, made)


def _point(
    key: str,
    runs: Sequence[Outcome],
    objectives: Sequence[str],
    varying: Sequence[str],
    config: ParetoConfig,
) -> Point:
    first, sign = runs[0], METRICS[config.metric].sign
    by_seed: dict[int, Outcome] = {}
    for run in runs:
        other = by_seed.setdefault(run.seed, run)
        if other is not run:
            raise ValueError(
                f"`runs` must differ in the seed or a setting that changes what is learnt, got "
                f"{other.folder} and {run.folder} with the same; leave one of them out, or name "
                f"the setting in `by`"
            )
    weights = None
    if first.weights is not None:
        weights = np.array([first.weights[name] for name in objectives], dtype=np.float64)
    texts = ["/".join(f"{weight:.4g}" for weight in weights)] if weights is not None else []
    others = _others(first, varying, config.by)
    label = ", ".join([*texts, *(f"{name}={shown(value)}" for name, value in others.items())])
    values = {
        seed: np.array([sign * by_seed[seed].values[name] for name in objectives])
        for seed in sorted(by_seed)
    }
    return Point(label or "-", key, weights, weights if first.has_ray else None, values)


def _varying(outcomes: Sequence[Outcome]) -> list[str]:
    """The settings in which runs differ, beside rule, weights and seed."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.compared)
    first, *others = outcomes
    return [
        name
        for name in names
        if name not in _APART and any(_value(o, name) != _value(first, name) for o in others)
    ]


def _others(outcome: Outcome, varying: Sequence[str], by: Sequence[str]) -> dict[str, Any]:
    return {name: _value(outcome, name) for name in varying if name not in by}


def _value(outcome: Outcome, name: str) -> Any:
    return outcome.compared.get(name, default_of(name))


def _of(outcome: Outcome, name: str) -> str:
    """The value of a setting by its dotted name."""
    value: Any = outcome.settings
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(
                f"`by` must name settings of the runs, got {name!r}, which {outcome.folder} does "
                f"not have; write it with its groups, such as `loss_options.beta`"
            )
        value = value[part]
    return shown(value)
