"""How many labels each objective has, and where two meet, how often they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raco_fast.dpo.data.tokenization import EncodedPair

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Labels:
    """Counts over some pairs.

    Args:
        counts: [m], labelled pairs, those with a soft label of one half among them.
        common: [m, m], pairs labelled for both.
        agree: [m, m], of these, those on which both prefer the same response.
        conflict: [m, m], those on which they prefer different ones.
        pairs: all of them, labelled or not.
    """

    counts: Array
    common: Array
    agree: Array
    conflict: Array
    pairs: int

    @property
    def agreement(self) -> Array:
        """[m, m], of the common pairs, the share that agree minus that in conflict; NaN without."""
        found = np.full_like(self.common, np.nan)
        np.divide(self.agree - self.conflict, self.common, out=found, where=self.common > 0)
        return found


def labels_of(pairs: Sequence[EncodedPair], objectives: Sequence[str]) -> Labels:
    """How often labels are there, and agree; a soft label of one half prefers neither."""
    labels = np.array([[pair.labels[name] for pair in pairs] for name in objectives])
    known = (labels != 0.0).astype(np.float64)
    a, b = ((sign * labels > 0.5).astype(np.float64) for sign in (1, -1))
    common = known @ known.T
    agree, conflict = a @ a.T + b @ b.T, a @ b.T + b @ a.T
    return Labels(np.diagonal(common).copy(), common, agree, conflict, len(pairs))
