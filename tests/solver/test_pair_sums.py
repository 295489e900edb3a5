"""`PairSums` against loops over pairs and over batches."""

from itertools import combinations

import numpy as np
import pytest

from raco_fast.solver.intervals import BLOCKS, interval
from raco_fast.solver.pair_sums import PairSums


def sums_of(v: np.ndarray, labelled: np.ndarray) -> PairSums:
    """Of the gradients v [m, N, d] of N pairs."""
    v = v * labelled[..., None]
    total, counts = v.sum(1), labelled.astype(float)
    products = np.einsum("ibd,jbd->ij", v, v)
    return PairSums(total @ total.T, products, counts.sum(1), counts @ counts.T, v.shape[1])


@pytest.fixture
def pairs() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    v = draw.standard_normal((3, 9, 5)) + draw.standard_normal((3, 1, 5))
    return v, np.array([[1] * 9, [1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 0, 0, 1, 1, 0, 0, 0]])


def test_products_of_different_pairs(pairs):
    v, labelled = pairs
    found = sums_of(v, labelled)
    for i in range(3):
        for j in range(3):
            each = [
                v[i, b] @ v[j, c]
                for b in range(9)
                for c in range(9)
                if b != c and labelled[i, b] and labelled[j, c]
            ]
            assert found.expected[i, j] == pytest.approx(np.mean(each), rel=1e-12)
    assert found.noise[1, 2] == 0.0  # no pair is labelled for both
    of_one = v[0] - v[0].mean(0)
    assert found.noise_of_a_pair[0] == pytest.approx((of_one**2).sum() / 8, rel=1e-12)


def test_pairs_that_are_left_out_were_never_there(pairs):
    v, labelled = pairs
    whole, block = sums_of(v, labelled), sums_of(v[:, 2:5], labelled[:, 2:5])
    of_block, of_all = ((v[:, k] * labelled[:, k, None]).sum(1) for k in (slice(2, 5), slice(9)))
    rest = [0, 1, 5, 6, 7, 8]
    expected = sums_of(v[:, rest], labelled[:, rest])
    found = whole.without(block, of_block @ of_all.T)
    for name in ("gram", "products", "counts", "common", "expected", "noise"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-12)
    assert found.pairs == 6
    some = found.of([0, 2]).expected
    np.testing.assert_allclose(some, expected.expected[np.ix_([0, 2], [0, 2])], atol=1e-12)


def test_a_batch_is_the_mean_over_all_batches_of_its_size(pairs):
    v, _ = pairs
    found = sums_of(v, np.ones((3, 9)))
    for n in (1, 4):
        batches = [v[:, list(b)].mean(1) for b in combinations(range(9), n)]
        mean = np.mean([g @ g.T for g in batches], axis=0)
        np.testing.assert_allclose(found.of_batches(n), mean, atol=1e-12)


def test_one_labelled_pair_has_no_product_with_another(pairs):
    v, labelled = pairs
    labelled = labelled.copy()
    labelled[2] = [0, 1, 0, 0, 0, 0, 0, 0, 0]
    found = sums_of(v, labelled)
    assert np.isnan(found.expected[2, 2])
    assert np.isnan(found.noise[2, 2])
    assert np.isfinite(found.expected[2, 1])


@pytest.mark.parametrize("size", [0.0, 3.0], ids=["noise alone", "orthogonal"])
def test_intervals_cover_what_is_there(size):
    """Also where all is noise, where leaving out blocks counts it twice, to the safe side."""
    draw = np.random.default_rng(6)
    truth, found = np.diag([size**2] * 2), np.zeros((2, 2))
    repeats = 150
    for _ in range(repeats):
        v = draw.standard_normal((2, 60, 80))
        v[[0, 1], :, [0, 1]] += size
        labelled = draw.random((2, 60)) < 0.7
        whole, total = sums_of(v, labelled), (v * labelled[..., None]).sum(1)
        left_out = []
        for block in np.array_split(np.arange(60), BLOCKS):
            own = (v[:, block] * labelled[:, block, None]).sum(1)
            sums = sums_of(v[:, block], labelled[:, block])
            left_out.append(whole.without(sums, own @ total.T).expected)
        for i, j in np.ndindex(2, 2):
            each = interval(whole.expected[i, j], np.array([H[i, j] for H in left_out]))
            found[i, j] += each.low <= truth[i, j] <= each.high
    assert (found / repeats > 0.91).all()  # two standard errors below 95 %
    if size:
        assert (found / repeats < 1.0).any()
