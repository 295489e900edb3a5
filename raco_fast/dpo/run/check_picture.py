"""The picture of `raco-fast check`: labels by objective, lengths of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raco_fast.dpo.data.batches import pair_length
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.run.data_check import DataCheck
from raco_fast.dpo.run.picture_file import draw_two
from raco_fast.pages.figures import color_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(
    data: DataCheck, training: Sequence[EncodedPair], max_length: int, destination: Path
) -> str:
    """As `draw_two`: the labels, and the lengths beside `max_length`."""

    def both(left: Axes, right: Axes) -> None:
        _draw_labels(left, data)
        right.hist([pair_length(pair) for pair in training], bins=40, color=color_of(4))
        right.axvline(max_length, color="gray", linestyle="--", label="max_length")
        right.set(xlabel="tokens of a prompt and its longer response", ylabel="training pairs")
        right.legend(frameon=False)

    return draw_two(destination, 4.0, both)


def _draw_labels(axes: Axes, data: DataCheck) -> None:
    names = list(data.preferred)
    a, b = ([data.preferred[name][k] for name in names] for k in (0, 1))
    none = [data.pairs - x - y for x, y in zip(a, b, strict=True)]
    before = [0] * len(names)
    for counts, label, color in (
        (a, "a preferred", color_of(2)),
        (b, "b preferred", color_of(1)),
        (none, "no label", "#D0D0D0"),
    ):
        axes.barh(names, counts, left=before, label=label, color=color)
        before = [x + y for x, y in zip(before, counts, strict=True)]
    axes.set(xlabel="training pairs")
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right")
