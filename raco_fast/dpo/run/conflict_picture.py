"""The picture of `raco-fast conflict`: what batches of every size show, who gains and loses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raco_fast.dpo.run.conflict_estimates import Conflict
from raco_fast.dpo.run.picture_file import draw_two
from raco_fast.pages.figures import color_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(found: Conflict, destination: Path) -> str:
    """As `draw_two`: the cosines, and the descent."""

    def both(left: Axes, right: Axes) -> None:
        _draw_cosines(left, found)
        _draw_descent(right, found)

    return draw_two(destination, 4.8, both)


def _draw_cosines(axes: Axes, found: Conflict) -> None:
    sizes = found.batch_sizes
    for k, (names, curve) in enumerate(found.curves.items()):
        each = next(two for two in found.two if two.names == names)
        color, line = color_of(k), "-" if each.product.sign else ":"
        axes.plot(sizes, curve, color=color, linestyle=line, label=" : ".join(names))
        place = sizes[-1] * 1.6 * 1.25**k
        axes.plot([place] * 2, [each.cosine.low, each.cosine.high], color=color, linestyle=line)
    axes.axvline(found.pairs_per_step, color="gray", linewidth=1)
    axes.axhline(0.0, color="gray", linewidth=1)
    axes.set(
        xscale="log",
        ylim=(-1.05, 1.05),
        xlabel=f"pairs in a step (line: {found.pairs_per_step})",
        ylabel="cosine that it shows on average",
        title="right: unbiased, 95 % (dotted: of either sign)",
    )
    if found.curves:
        axes.legend(frameon=False)


def _draw_descent(axes: Axes, found: Conflict) -> None:
    for k, update in enumerate(found.updates):
        for i, x in enumerate(update.descent.values()):
            place = i + (k - 1) * 0.2
            label = update.source if i == 0 else None
            axes.plot([place] * 2, [x.low, x.high], color=color_of(k))
            axes.plot([place], [x.value], "o", color=color_of(k), label=label)
    axes.axhline(0.0, color="gray", linewidth=1)
    names = list(found.updates[0].descent) if found.updates else []
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set(title="descent (below 0: the update works against it)")
    if found.updates:
        axes.legend(frameon=False)
