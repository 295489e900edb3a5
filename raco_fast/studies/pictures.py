"""Pictures of fronts, as SVG text; matplotlib is imported where one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from raco_fast.pages.figures import LOOKS, has_pictures, plain, svg_of
from raco_fast.studies.fronts import front
from raco_fast.studies.groups import Group, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS = 3


def pictures(study: Study, metric: str) -> dict[str, str]:
    """Name -> SVG; none without matplotlib.

    `fronts` has a panel for each pair of up to three objectives, `parallel` an axis for each of
    three and more.
    """
    if not has_pictures():
        return {}
    from matplotlib.figure import Figure

    m = len(study.objectives)
    drawn: dict[str, str] = {}
    if m <= _MOST_PANELS:
        pairs = list(combinations(range(m), 2))
        figure = Figure(figsize=(max(6.0, 4.6 * len(pairs)), 5.0), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(pairs)))
        for axes, (x, y) in zip(panels, pairs, strict=True):
            _draw_pair(axes, study, x, y, metric)
        weights = "/".join(study.objectives)
        figure.suptitle(
            f"Mean over seeds with its 95 % interval; weights are {weights}", fontsize=10
        )
        drawn["fronts"] = _svg(figure, panels[0])
    if m >= _MOST_PANELS:
        figure = Figure(figsize=(max(6.0, 1.8 * m), 5.0), layout="constrained")
        axes = figure.subplots()
        _draw_parallel(axes, study, metric)
        figure.suptitle("Means over seeds; pale: not on its rule's front", fontsize=10)
        drawn["parallel"] = _svg(figure, axes)
    return drawn


def _draw_pair(axes: Axes, study: Study, x: int, y: int, metric: str) -> None:
    """Means with their 95 % intervals over seeds; a line joins a group's front in these two.

    The axes are those of the means: with two seeds an interval can be ten times as wide.
    """
    written = {"-"}
    for group, color, marker in _looks(study.groups):
        means = study.sign * group.means
        xs, ys = ([point.spread(k, study.sign) for point in group.points] for k in (x, y))
        axes.errorbar(
            means[:, x],
            means[:, y],
            xerr=[spread.interval() if len(spread.values) > 1 else 0.0 for spread in xs],
            yerr=[spread.interval() if len(spread.values) > 1 else 0.0 for spread in ys],
            linestyle="none",
            marker=marker,
            color=color,
            elinewidth=0.5,
            markersize=8,
            markerfacecolor="none",
            label=group.name,
        )
        line = means[front(group.means[:, [x, y]])]
        line = line[np.argsort(line[:, x])]
        axes.plot(line[:, x], line[:, y], color=color, linewidth=0.8, alpha=0.6)
        for point, mean in zip(group.points, means, strict=True):
            if point.label not in written:  # beside the first rule's point: others' are near it
                written.add(point.label)
                at = (float(mean[x]), float(mean[y]))
                axes.annotate(point.label, at, (6, 5), textcoords="offset points", fontsize=7)
    everything = study.sign * np.concatenate([group.means for group in study.groups])
    low, high = everything.min(axis=0), everything.max(axis=0)
    room = np.maximum(0.4 * (high - low), 1e-6)
    axes.set_xlim(low[x] - room[x], high[x] + room[x])
    axes.set_ylim(low[y] - room[y], high[y] + room[y])
    axes.set_xlabel(f"{metric} of {study.objectives[x]}")
    axes.set_ylabel(f"{metric} of {study.objectives[y]}")
    axes.margins(0.12)
    plain(axes)


def _draw_parallel(axes: Axes, study: Study, metric: str) -> None:
    """A line for each point, over the objectives; the group's front in full color."""
    places = np.arange(len(study.objectives))
    for group, color, marker in _looks(study.groups):
        best = front(group.means)
        for k, mean in enumerate(study.sign * group.means):
            axes.plot(
                places,
                mean,
                color=color,
                marker=marker,
                markerfacecolor="none",
                alpha=1.0 if best[k] else 0.3,
                label=group.name if k == int(best.argmax()) else None,
            )
    axes.set_xticks(places, study.objectives)
    axes.set_ylabel(metric)
    axes.margins(0.12)
    plain(axes)


def _looks(groups: Sequence[Group]) -> list[tuple[Group, str, str]]:
    """With a color and a marker each; more groups than colors change the marker."""
    colors, markers = LOOKS["color"], LOOKS["marker"]
    n = len(colors)
    return [(group, colors[k % n], markers[(k + k // n) % n]) for k, group in enumerate(groups)]


def _svg(figure: Figure, labelled: Axes) -> str:
    handles, labels = labelled.get_legend_handles_labels()
    columns = min(4, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return svg_of(figure)
