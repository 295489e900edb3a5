"""Pictures of one or several runs, drawn from their metrics, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raco_fast.dpo.run.metrics_file import is_evaluation
from raco_fast.pages.figures import color_of, has_pictures, plain, svg_of
from raco_fast.report import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
_LINES = ("-", "--", ":", "-.")
_SMOOTHED = 20
"""A line is a mean over this share of the steps, one in so many; the steps themselves are pale."""


@dataclass(frozen=True)
class _Panel:
    """One plot.

    Args:
        title: above it.
        prefix: of the metrics, one line for each name that begins with it.
        evaluated: whether evaluations have it too, with the prefix `eval_`.
        share: a share of pairs, whose evaluations have Wilson's interval.
    """

    title: str
    prefix: str
    evaluated: bool = False
    share: bool = False


_PANELS = (
    _Panel("loss", "loss/", evaluated=True),
    _Panel("margin of the implicit reward", "rewards/margins/", evaluated=True),
    _Panel("accuracy of the implicit reward", "rewards/accuracies/", evaluated=True, share=True),
    _Panel("cosine between gradients in a step", "raco/cosine/"),
    _Panel("cosine between expected gradients, estimated", "raco/cosine_unbiased/"),
    _Panel("coefficient in the update", "raco/coefficient/"),
    _Panel("norm of the gradient", "raco/grad_norm/"),
    _Panel("share of steps that clipping changed", "raco/clip_active"),
)


def curves(runs: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """One picture of all runs, a panel for each metric that any of them has.

    Args:
        runs: name -> records of its metrics.jsonl.
    Returns:
        {"curves": SVG}; empty without matplotlib.
    """
    if not has_pictures():
        return {}
    from matplotlib.figure import Figure

    panels = [p for p in _PANELS if any(_names(p, records) for records in runs.values())]
    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(11, 3.3 * rows), layout="constrained")
    places = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, panel, runs)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    return {"curves": svg_of(figure)}


def _draw(axes: Axes, panel: _Panel, runs: Mapping[str, Sequence[Record]]) -> None:
    """A color for each name of a metric, a kind of line for each run."""
    names = list(dict.fromkeys(n for records in runs.values() for n in _names(panel, records)))
    for k, (run, records) in enumerate(runs.items()):
        for name in names:
            color, line = color_of(names.index(name)), _LINES[k % len(_LINES)]
            label = name.removeprefix(panel.prefix) or panel.title
            label = f"{label}, {run}" if len(runs) > 1 else label
            steps, values = _series(records, name)
            if len(steps):
                axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
                axes.plot(steps, _smooth(values), color=color, linestyle=line, label=label)
            if panel.evaluated:
                _draw_evaluations(axes, panel, records, name, color)
    axes.set_title(panel.title, fontsize=10)
    if panel.share:
        axes.axhline(0.5, color="gray", linewidth=0.8)
    plain(axes)
    if len(names) > 1 or len(runs) > 1:
        axes.legend(frameon=False, fontsize=7)


def _draw_evaluations(
    axes: Axes, panel: _Panel, records: Sequence[Record], name: str, color: str
) -> None:
    """Points, a share's with its interval; held-out pairs are told from training by the marker."""
    steps, values = _series(records, f"eval_{name}")
    if not len(steps):
        return
    axes.plot(steps, values, "o", color=color, markerfacecolor="none", markersize=5)
    if panel.share:
        _, pairs = _series(records, f"eval_pairs/{name.removeprefix(panel.prefix)}")
        for step, value, n in zip(steps, values, pairs, strict=False):
            axes.plot([step] * 2, wilson_interval(value, int(n)), color=color, linewidth=0.8)


def _names(panel: _Panel, records: Sequence[Record]) -> list[str]:
    """The metrics of steps that a panel shows, in their order."""
    found = (name for record in records if not is_evaluation(record) for name in record)
    return list(dict.fromkeys(name for name in found if name.startswith(panel.prefix)))


def _series(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return np.array([s for s, _ in found]), np.array([v for _, v in found], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean, narrower at the ends."""
    half = max(1, len(values) // _SMOOTHED) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    smooth: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return smooth
