"""The picture of `raco-fast check`: labels by objective, lengths of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raco_fast.dpo.data.batches import pair_length
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.run.data_check import DataCheck
from raco_fast.dpo.run.files import atomic_file
from raco_fast.pages.figures import NO_PICTURE, color_of


def draw(
    data: DataCheck, training: Sequence[EncodedPair], max_length: int, destination: Path
) -> str:
    """Write a PNG, replaced as a whole.

    Returns:
        An empty string, or, where matplotlib is not installed, a sentence that says that the
        picture is left out and how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return NO_PICTURE
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(data.preferred)
    a, b = ([data.preferred[name][k] for name in names] for k in (0, 1))
    none = [data.pairs - x - y for x, y in zip(a, b, strict=True)]
    before = [0] * len(names)
    for counts, label, color in (
        (a, "a preferred", color_of(2)),
        (b, "b preferred", color_of(1)),
        (none, "no label", "#D0D0D0"),
    ):
        left.barh(names, counts, left=before, label=label, color=color)
        before = [x + y for x, y in zip(before, counts, strict=True)]
    left.set(xlabel="training pairs")
    left.invert_yaxis()
    left.legend(frameon=False, loc="lower right")
    right.hist([pair_length(pair) for pair in training], bins=40, color=color_of(4))
    right.axvline(max_length, color="gray", linestyle="--", label="max_length")
    right.set(xlabel="tokens of a prompt and its longer response", ylabel="training pairs")
    right.legend(frameon=False)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(destination) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return ""
