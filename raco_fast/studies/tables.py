"""The tables of a comparison of fronts, as texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raco_fast.pages.html_page import Table
from raco_fast.studies.comparison import Comparison, hypervolumes, ray_distances
from raco_fast.studies.fronts import dominates, front
from raco_fast.studies.groups import Group, Point, Study


def tables(study: Study, comparisons: Sequence[Comparison]) -> list[Table]:
    """All that have a row."""
    made = [_points(study), _groups(study), _dominated(study), _gains(study, comparisons)]
    made.append(_indicators(comparisons))
    return [table for table in made if table.rows]


def name_of(group: Group, point: Point) -> str:
    """How tables call a point."""
    return f"{group.name} at {point.label}" if point.label != "-" else group.name


def dominators(study: Study) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """Each point that is dominated by its mean -> (who, in how many seeds, of how many common)."""
    named = [(name_of(group, point), point) for group in study.groups for point in group.points]
    for name, point in named:
        found = []
        for other_name, other in named:
            if dominates(other.mean, point.mean):
                seeds = {*point.values} & {*other.values}
                times = sum(bool(dominates(other.values[s], point.values[s])) for s in seeds)
                found.append((other_name, times, len(seeds)))
        if found:
            yield name, found


def _points(study: Study) -> Table:
    rows = []
    for group in study.groups:
        best = front(group.means)
        for point, on_front in zip(group.points, best, strict=True):
            spreads = [point.spread(k, study.sign) for k in range(len(study.objectives))]
            rays = ray_distances(point, study)
            rows.append(
                (
                    group.name,
                    point.label,
                    str(len(point.values)),
                    *(spread.with_interval() for spread in spreads),
                    "yes" if on_front else "no",
                    "-" if rays is None else rays.with_interval(),
                )
            )
    weights = f"weights ({'/'.join(study.objectives)})"
    return Table(
        "Points",
        "One line a setting. `front`: no other point of the same rule is at least as good in every "
        "objective and better in one, by the means over seeds. `off ray`: the distance from the "
        "ray that leads from the reference point along the weights.",
        ("rule", weights, "seeds", *study.objectives, "front", "off ray"),
        rows,
    )


def _groups(study: Study) -> Table:
    rows = []
    for group in study.groups:
        volumes = hypervolumes(group, study)
        far = [rays.mean for p in group.points if (rays := ray_distances(p, study)) is not None]
        rows.append(
            (
                group.name,
                str(len(group.points)),
                str(int(front(group.means).sum())),
                str(len(group.seeds)),
                "-" if volumes is None else volumes.with_interval(),
                f"{sum(far) / len(far):.4f}" if far else "-",
            )
        )
    return Table(
        "Fronts",
        "Hypervolume: of the front of each seed above the reference point, mean over the seeds "
        "that all points have. It grows with the number of points, so compare rules that have the "
        "same ones. `off ray`: mean over the points.",
        ("rule", "points", "on front", "seeds", "hypervolume", "off ray"),
        rows,
    )


def _dominated(study: Study) -> Table:
    rows = [
        (name, ", ".join(f"{who} ({times} of {n} seeds)" for who, times, n in found))
        for name, found in dominators(study)
    ]
    return Table(
        "Dominated points",
        "By the means over seeds; in brackets, in how many of the seeds that both have it holds "
        "as well.",
        ("point", "dominated by"),
        rows,
    )


def _gains(study: Study, comparisons: Sequence[Comparison]) -> Table:
    rows = []
    for each in comparisons:
        volume = "-" if each.hypervolume is None else str(each.hypervolume)
        gains = [str(each.gains[name]) if each.gains else "-" for name in study.objectives]
        if each.gains or each.hypervolume is not None:
            of = (f"{each.first} - {each.second}", str(each.points), str(each.seeds))
            rows.append((*of, *gains, volume))
    return Table(
        "Rules against each other",
        "How much better the first is, over the settings and seeds that both have, with the 95 % "
        "percentile interval of a bootstrap that draws settings and seeds with replacement, the "
        "same for both; of hypervolumes, which are over all settings of each, seeds alone. An "
        "interval without zero is a clear difference; with few seeds these are too narrow, and of "
        "twenty differences that are none one looks clear.",
        ("rules", "settings", "seeds", *study.objectives, "hypervolume"),
        rows,
    )


def _indicators(comparisons: Sequence[Comparison]) -> Table:
    rows = []
    for each in comparisons:
        if each.epsilon is not None:
            one, other = each.epsilon
            rows.append((each.first, each.second, one.with_interval(), other.with_interval()))
    return Table(
        "Additive ε-indicators",
        "What has to be added to every objective of the front of one so that it leaves no point of "
        "the other's above it, in the unit of the metric, mean over seeds. At most 0: it already "
        "covers all of it.",
        ("A", "B", "A over B", "B over A"),
        rows,
    )
