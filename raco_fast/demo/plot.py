"""The picture of the study: judged scores, one line a rule, one point a weight vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_fast.demo.summary import Row, weights_name
from raco_fast.dpo.run.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colors, told apart by color-blind readers too; shapes differ as well.
# cagrad and cagrad-clip often lie on each other, so one is hollow and dashed.
_LOOKS: dict[str, dict[str, Any]] = {
    "start": {"color": "black", "marker": "*", "markersize": 13, "linestyle": "none"},
    "linear": {"color": "#E69F00", "marker": "o", "markersize": 8},
    "cagrad": {"color": "#0072B2", "marker": "s", "markersize": 7},
    "cagrad-clip": {
        "color": "#D55E00",
        "marker": "^",
        "markersize": 11,
        "markerfacecolor": "none",
        "linestyle": "--",
    },
    "mgda": {"color": "#009E73", "marker": "D", "markersize": 8, "linestyle": "none"},
}
_PANELS = (("brevity", "coverage"), ("brevity", "faithfulness"))


def plot_scores(rows: Sequence[Row], destination: Path) -> str:
    """Draw the rows of `summarize` into a PNG, replaced as a whole.

    Returns:
        An empty string, or, where matplotlib is not installed, a sentence that says the plot is
        left out and how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return (
            "The plot is left out because matplotlib is not installed: "
            "pip install 'raco-fast[plot]'"
        )
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    for axes, (x, y) in zip(panels, _PANELS, strict=True):
        _draw_panel(axes, rows, x, y)
    _annotate_weights(panels[0], rows, *_PANELS[0])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    seeds = len(rows[0].scores["coverage"].values)
    figure.suptitle(
        f"Judged scores of generated summaries, mean and standard deviation over {seeds} seed"
        + "s" * (seeds > 1)
        + "; weights are coverage/brevity/faithfulness",
        fontsize=11,
    )
    with atomic_file(destination) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return ""


def _draw_panel(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    rules = list(dict.fromkeys(row.rule for row in rows))
    for rule in rules:
        line = [row for row in rows if row.rule == rule]
        line.sort(key=lambda row: (row.weights or {}).get("coverage", 0.0))
        look = _LOOKS[rule]
        xs, ys = ([row.scores[name].mean for row in line] for name in (x, y))
        x_bars, y_bars = ([row.scores[name].deviation for row in line] for name in (x, y))
        axes.errorbar(
            xs, ys, y_bars, x_bars, fmt="none", ecolor=look["color"], elinewidth=0.9, alpha=0.45
        )
        axes.plot(xs, ys, linewidth=1.7, markeredgewidth=1.5, label=rule, **look)
    axes.set_xlabel(f"{x} (higher is shorter)")
    axes.set_ylabel(f"{y} (higher is better)")
    axes.margins(0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _annotate_weights(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    """Write each weight vector once, beside the first rule's point: other rules' are near it."""
    written = set()
    for row in rows:
        name = weights_name(row.weights)
        if row.weights is None or name in written:
            continue
        written.add(name)
        axes.annotate(
            name,
            (row.scores[x].mean, row.scores[y].mean),
            xytext=(8, 7),
            textcoords="offset points",
            fontsize=8.5,
            color="0.25",
        )
