"""Over many batches the U-statistic is right on average, and the batch's Gram matrix is not.

Linear regression: the expected gradients and their covariances are known in closed form.
"""

from itertools import combinations, pairwise

import numpy as np
import pytest

from raco_fast.solver.u_statistic import SampleSums

D, M = 5, 3
THETA = np.array([0.3, -0.2, 0.5, 0.1, -0.4])
TARGETS = np.array(
    [[1.0, 0.0, 0.5, -0.3, 0.2], [-0.6, 0.1, 0.4, 0.2, 0.0], [0.2, -0.9, 0.1, 0.7, 0.3]]
)
NOISE = np.array([0.5, 1.0, 2.0])  # of each objective's targets
# x ~ N(0, I), y_i = target_i·x + noise: half the squared error has the gradient x (x·e_i - noise).
ERRORS = THETA - TARGETS
TRUTH = ERRORS @ ERRORS.T
# E|x (x·e - noise)|² - |e|²  for a standard normal x of D dimensions.
TRACES = (D + 2) * np.diag(TRUTH) + D * NOISE**2 - np.diag(TRUTH)
BATCHES = 10_000


def gradients(draw: np.random.Generator, batches: int, samples: int) -> np.ndarray:
    """[batches, samples, m, d]: of one sample each."""
    x = draw.standard_normal((batches, samples, D))
    residual = x @ ERRORS.T - NOISE * draw.standard_normal((batches, samples, M))
    return residual[..., None] * x[:, :, None]


def sums_of(v: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, SampleSums]:
    """(the Gram matrix of a batch, what its samples have with themselves); v [n, m, d]."""
    counts = labelled.sum(0)
    v = v * labelled[..., None] / counts[:, None]
    total = v.sum(0)
    own = np.einsum("bid,bjd->ij", v, v)
    common = labelled.T @ labelled
    return total @ total.T, SampleSums(own, counts, common, len(v))


def within_standard_errors(estimates: np.ndarray, truth: np.ndarray, times: float = 4.0) -> None:
    error = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    assert (abs(estimates.mean(0) - truth) <= times * error).all()


@pytest.mark.parametrize("labels", ["all", "some", "own pairs"])
def test_the_mean_is_the_gram_matrix_of_the_expectation(labels):
    draw, n = np.random.default_rng(0), 6
    v = gradients(draw, BATCHES, n)
    labelled = np.ones((n, M))
    if labels == "some":
        labelled[:2, 0] = labelled[2:4, 1] = labelled[5, 2] = 0.0
    elif labels == "own pairs":
        labelled = np.repeat(np.eye(M), 2, axis=0)
    v = v * labelled[..., None] / labelled.sum(0)[:, None]
    counts, common = labelled.sum(0), labelled.T @ labelled
    total = v.sum(1)
    batch = total @ total.swapaxes(1, 2)
    own = np.einsum("tbid,tbjd->tij", v, v, optimize=True)
    unbiased = np.array(
        [SampleSums(C, counts, common, n).unbiased(M) for C, M in zip(own, batch, strict=True)]
    )
    within_standard_errors(unbiased, TRUTH)
    bias = TRACES / labelled.sum(0)
    within_standard_errors(batch[:, range(M), range(M)], np.diag(TRUTH) + bias)
    error = batch.std(0, ddof=1) / np.sqrt(BATCHES)
    assert (np.diag(abs(batch.mean(0) - TRUTH) / error) > 20).all()
    if labels == "own pairs":  # no sample has both, so their products are unbiased as they are
        np.testing.assert_allclose(unbiased[0][0, 1], batch[0][0, 1], rtol=1e-12)


def test_micro_batches_and_processes_add_up():
    """However unevenly a step is cut, its sums are those of the step."""
    draw = np.random.default_rng(1)
    labelled = (draw.random((11, M)) < 0.7).astype(float)
    v = gradients(draw, 1, 11)[0]
    gram, whole = sums_of(v, labelled)
    v = v * labelled[..., None] / labelled.sum(0)[:, None]
    parts = [slice(0, 1), slice(1, 4), slice(4, 11)]
    own = sum(np.einsum("bid,bjd->ij", v[part], v[part]) for part in parts)
    common = sum(labelled[part].T @ labelled[part] for part in parts)
    cut = SampleSums(own, labelled.sum(0), common, 11)
    np.testing.assert_allclose(cut.unbiased(gram), whole.unbiased(gram), rtol=1e-9)


def test_whole_micro_batches_as_samples():
    """Four micro-batches of unequal size, each weighed by it."""
    draw = np.random.default_rng(2)
    sizes = [1, 2, 3, 6]
    ends = np.cumsum([0, *sizes])
    v = gradients(draw, BATCHES, sum(sizes)) / sum(sizes)
    of_each = np.stack([v[:, a:b].sum(1) for a, b in pairwise(ends)])
    total = of_each.sum(0)
    own = (of_each @ of_each.swapaxes(2, 3)).sum(0)
    counts, common = np.full(M, 12.0), np.full((M, M), float(np.square(sizes).sum()))
    grams = total @ total.swapaxes(1, 2)
    estimates = [
        SampleSums(C, counts, common, 4).unbiased(gram) for C, gram in zip(own, grams, strict=True)
    ]
    within_standard_errors(np.array(estimates), TRUTH)


def test_what_has_no_pair_of_samples_does_not_exist():
    labelled = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    v = gradients(np.random.default_rng(3), 1, 3)[0]
    with np.errstate(invalid="ignore"):
        gram, sums = sums_of(v, np.maximum(labelled, 1e-300))
    sums = SampleSums(sums.products, labelled.sum(0), labelled.T @ labelled, 3)
    exists = np.isfinite(sums.unbiased(gram))
    assert exists.tolist() == [[True, True, False], [True, False, False], [False, False, False]]


def test_it_is_the_mean_of_double_samples_over_all_halves():
    """What `sdmgrad` and `modo` ask for: J1 J2' of two independent batches."""
    v = gradients(np.random.default_rng(3), 1, 6)[0]
    found = []
    for half in combinations(range(6), 3):
        rest = [b for b in range(6) if b not in half]
        found.append(v[list(half)].mean(0) @ v[rest].mean(0).T)
    gram, sums = sums_of(v, np.ones((6, M)))
    np.testing.assert_allclose(np.mean(found, 0), sums.unbiased(gram), rtol=1e-12)
    assert abs(np.mean(found, 0) - gram).max() > 0.1
