"""How often two objectives' labels meet, and agree, counted by hand."""

import numpy as np

from raco_fast.dpo.data.label_counts import labels_of
from raco_fast.dpo.data.tokenization import EncodedPair

LABELS = [(1, 1), (1, -1), (-1, 1), (-0.75, -1), (0.75, 0), (0, 0), (0.5, 1)]


def test_a_soft_label_of_one_half_is_a_label_and_prefers_neither() -> None:
    pairs = [
        EncodedPair(str(k), [1], [2], [3], {"x": x, "y": y}) for k, (x, y) in enumerate(LABELS)
    ]
    found = labels_of(pairs, ["x", "y"])
    assert found.pairs == len(LABELS)
    np.testing.assert_array_equal(found.counts, [6, 5])
    np.testing.assert_array_equal(found.common, [[6, 5], [5, 5]])
    np.testing.assert_array_equal(found.agree, [[5, 2], [2, 5]])
    np.testing.assert_array_equal(found.conflict, [[0, 2], [2, 0]])
    np.testing.assert_allclose(found.agreement, [[5 / 6, 0.0], [0.0, 1.0]])


def test_without_a_common_pair_there_is_no_agreement() -> None:
    pairs = [EncodedPair("0", [1], [2], [3], {"x": 1, "y": 0})]
    assert np.isnan(labels_of(pairs, ["x", "y"]).agreement[0, 1])
