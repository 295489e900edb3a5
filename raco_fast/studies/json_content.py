"""A comparison of fronts as plain JSON values, in full precision; null where there is no number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from raco_fast.studies.comparison import Comparison, Estimate, hypervolumes, ray_distances
from raco_fast.studies.fronts import front
from raco_fast.studies.groups import Group, Study
from raco_fast.studies.pareto_config import ParetoConfig
from raco_fast.studies.spread import Spread
from raco_fast.studies.tables import dominators


def json_content(
    study: Study, config: ParetoConfig, comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """All numbers of the report, with the settings that they were made with."""
    return {
        "settings": asdict(config),
        "objectives": list(study.objectives),
        "reference": study.shown(study.reference),
        "groups": [_group(group, study) for group in study.groups],
        "dominated": {
            name: [{"by": who, "seeds": times, "of": n} for who, times, n in found]
            for name, found in dominators(study)
        },
        "comparisons": [_comparison(each) for each in comparisons],
    }


def _group(group: Group, study: Study) -> dict[str, Any]:
    points = []
    for point, on_front in zip(group.points, front(group.means), strict=True):
        spreads = {n: point.spread(k, study.sign) for k, n in enumerate(study.objectives)}
        points.append(
            {
                "label": point.label,
                "weights": None if point.weights is None else point.weights.tolist(),
                "seeds": list(point.values),
                "values": {name: _spread(spread) for name, spread in spreads.items()},
                "on_front": bool(on_front),
                "ray_distance": _spread(ray_distances(point, study)),
            }
        )
    volumes = _spread(hypervolumes(group, study))
    return {"name": group.name, "seeds": group.seeds, "hypervolume": volumes, "points": points}


def _comparison(each: Comparison) -> dict[str, Any]:
    one, other = each.epsilon or (None, None)
    return {
        "first": each.first,
        "second": each.second,
        "settings": each.points,
        "seeds": each.seeds,
        "gains": {name: _estimate(estimate) for name, estimate in each.gains.items()},
        "hypervolume": _estimate(each.hypervolume),
        "epsilon_first_over_second": _spread(one),
        "epsilon_second_over_first": _spread(other),
    }


def _spread(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    half = spread.interval()
    known = half if math.isfinite(half) else None
    return {"mean": spread.mean, "half_interval": known, "by_seed": list(spread.values)}


def _estimate(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    return {name: None if math.isnan(v) else v for name, v in asdict(estimate).items()}
