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
        counts: [m], labelled pairs.
        common: [m, m], pairs labelled for both.
        agreement: [m, m], of the common pairs, the share whose labels agree minus that whose labels
            conflict; NaN without any.
        pairs: all of them, labelled or not.
    """

    counts: Array
    common: Array
    agreement: Array
    pairs: int


def labels_of(pairs: Sequence[EncodedPair], objectives: Sequence[str]) -> Labels:
    """How often labels are there, and agree."""
    signs = np.sign([[pair.labels[name] for pair in pairs] for name in objectives])
    common = (abs(signs) @ abs(signs).T).astype(np.float64)
    agreement = np.full_like(common, np.nan)
    np.divide(signs @ signs.T, common, out=agreement, where=common > 0)
    return Labels(np.diagonal(common).copy(), common, agreement, len(pairs))
