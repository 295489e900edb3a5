"""The picture of the study: judged scores, one line a rule and Gram, one point a weight vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raco_fast.demo.hypervolumes import fronts_of
from raco_fast.demo.summary import Row
from raco_fast.dpo.run.files import atomic_file
from raco_fast.pages.figures import LOOKS, NO_PICTURE
from raco_fast.studies.spread import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_scores(rows: Sequence[Row], destination: Path) -> str:
    """Draw the rows of `summarize` into a PNG, replaced as a whole.

    Returns:
        An empty string, or, where matplotlib is not installed, a sentence that says the plot is
        left out and how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return NO_PICTURE
    figure = Figure(layout="constrained")
    # What takes words, or is free of them, against brevity.
    names = list(rows[0].scores)
    others = [name for name in names if name != "brevity"]
    figure.set_size_inches(max(5.5 * len(others), 7), 5.2)
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    for axes, name in zip(panels, others, strict=True):
        _draw_panel(axes, rows, "brevity", name)
    _, labels = legend = panels[0].get_legend_handles_labels()
    figure.legend(
        *legend, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=8.5
    )
    seeds = len(rows[0].scores["coverage"].values)
    figure.suptitle(
        f"Judged scores of generated summaries, mean and 95 % interval over {seeds} seed"
        + "s" * (seeds > 1)
        + f"; weights are {'/'.join(names)}",
        fontsize=11,
    )
    with atomic_file(destination) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return ""


def _draw_panel(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    annotated: set[tuple[float, ...]] = {()}
    axes.set_prop_cycle(**LOOKS)
    volumes = {front.method: front.volume.with_interval() for front in fronts_of(rows[1:])}
    for method in dict.fromkeys(row.method for row in rows):
        line = sorted((row for row in rows if row.method == method), key=lambda row: row.weights)
        xs, ys = ([row.scores[name] for row in line] for name in (x, y))
        axes.errorbar(
            [spread.mean for spread in xs],
            [spread.mean for spread in ys],
            xerr=[_bar(spread) for spread in xs],
            yerr=[_bar(spread) for spread in ys],
            elinewidth=0.5,
            markersize=9,
            markerfacecolor="none",
            linestyle="--" if line[0].gram == "unbiased" else "-",
            label=method + (f", hypervolume {volumes[method]}" if method in volumes else ""),
        )
        # Each weight vector is written once, beside the first rule's point: others' are near it.
        for row in line:
            if row.weights not in annotated:
                annotated.add(row.weights)
                at = (row.scores[x].mean, row.scores[y].mean)
                axes.annotate(row.weights_text, at, (8, 7), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"{x} (higher is shorter)")
    axes.set_ylabel(f"{y} (higher is better)")
    axes.margins(0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(spread: Spread) -> float:
    """The half width of the interval; one seed has none, and no bar."""
    half = spread.interval()
    return half if math.isfinite(half) else 0.0
