"""`ExpectedGram`: averages with honest errors, believed as far as they stand out of their noise."""

import json

import numpy as np
import pytest
import torch

from raco_fast.solver.dual import solve_dual
from raco_fast.solver.expected_gram import Estimate, ExpectedGram
from raco_fast.solver.gram_options import GramOptions
from raco_fast.solver.registry import RuleLike
from raco_fast.solver.u_statistic import SampleSums

WEIGHTS = np.array([0.5, 0.3, 0.2])
EVERYONE = [0, 1, 2]
# Expected gradients: the second is against the first, the third small.
G = np.zeros((3, 40))
G[0, 0], G[1, :2], G[2, 1:3] = 2.0, (-1.0, 1.5), (0.4, 0.3)
TRUTH = G @ G.T
SAMPLES, RUNS = 8, 120
DEVIATION = 1.5  # of each number of a sample's gradient
TRACE = DEVIATION**2 * G.shape[1]


def batch(draw: np.random.Generator, scale: float = 1.0) -> tuple[np.ndarray, SampleSums]:
    noise = draw.standard_normal((SAMPLES, *G.shape))
    v = scale * (G + DEVIATION * noise) / SAMPLES
    total = v.sum(0)
    common = np.full((3, 3), float(SAMPLES))
    own = np.einsum("bid,bjd->ij", v, v)
    return total @ total.T, SampleSums(own, np.full(3, float(SAMPLES)), common, SAMPLES)


def after(
    steps: int,
    seed: int = 0,
    ema: float | None = 0.95,
    scale=lambda t: 1.0,
    only_last: bool = False,
) -> tuple[ExpectedGram, list[Estimate]]:
    draw, expected, found = np.random.default_rng(seed), ExpectedGram(3, ema), []
    for t in range(steps):
        gram, sums = batch(draw, scale(t))
        expected.take(gram, sums)
        if not only_last or t == steps - 1:
            found.append(expected.estimate(gram, sums.counts, WEIGHTS, EVERYONE))
    return expected, found


def cosines(M: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.diag(M))
    return M / np.outer(norms, norms)


INSIDE = {"name": "cagrad-clip", "clip": "inside", "kappa": 1.5}
SMOOTH = {"name": "cagrad-clip", "clip": "smooth", "q": 2.0}


def coefficients(estimate: Estimate, rule: RuleLike = "cagrad-clip") -> np.ndarray:
    solution = solve_dual(estimate.gram, WEIGHTS, 0.4, rule)
    return solution.along(torch.from_numpy(TRUTH), estimate, "batch").coefficients


def is_no_conflict(M: np.ndarray) -> bool:
    return bool(np.allclose(M, M[0, 0], rtol=1e-12)) and M[0, 0] > 0


def test_it_begins_with_the_prior_for_which_rules_give_the_weighted_sum():
    _, found = after(3)
    for estimate in found:
        assert estimate.shrinkage == 0.0
        assert is_no_conflict(estimate.gram)
        for rule in ("cagrad-clip", "cagrad", INSIDE, SMOOTH, "mgda", "nash", "cr-mogm"):
            found = coefficients(estimate, rule)
            np.testing.assert_allclose(found / found.sum(), WEIGHTS, rtol=1e-9)


@pytest.mark.parametrize("rule", ["cagrad", "cagrad-clip", INSIDE, SMOOTH])
def test_the_correction_keeps_its_length_whatever_is_believed(rule):
    for estimate in after(40)[1][::6]:
        correction = coefficients(estimate, rule) - WEIGHTS
        length = np.sqrt(correction @ TRUTH @ correction)
        assert length == pytest.approx(0.4 * np.sqrt(WEIGHTS @ TRUTH @ WEIGHTS))


def test_errors_are_those_of_many_runs():
    """Means over many runs, and their spread beside what a run says of itself."""
    last = [after(40, seed, only_last=True)[1][-1] for seed in range(RUNS)]
    means = np.array([one.mean for one in last])
    said = np.sqrt(np.mean([one.standard_error**2 for one in last], 0))
    spread = means.std(0, ddof=1)
    assert (abs(means.mean(0) - TRUTH) <= 4 * spread / np.sqrt(RUNS)).all()
    np.testing.assert_allclose(said, spread, rtol=0.2)
    of_cosines = np.array([one.cosines for one in last])[:, 0, 1]
    said = np.sqrt(np.mean([one.cosine_errors[0, 1] ** 2 for one in last]))
    assert said == pytest.approx(of_cosines.std(ddof=1), rel=0.25)
    noise = np.array([one.noise for one in last])
    assert (abs(noise.mean(0) - TRACE) <= 4 * noise.std(0, ddof=1) / np.sqrt(RUNS)).all()
    share = np.mean([one.noise_share for one in last], 0)[:2]
    of_batch = TRACE / SAMPLES
    np.testing.assert_allclose(share, of_batch / (of_batch + np.diag(TRUTH)[:2]), rtol=0.1)
    scale = np.median([one.noise_scale for one in last], 0)[:2]
    np.testing.assert_allclose(scale, TRACE / np.diag(TRUTH)[:2], rtol=0.2)


def test_a_conflict_that_batches_do_not_show_is_found():
    expected, found = after(200)
    gram, sums = batch(np.random.default_rng(9))
    estimate = expected.estimate(gram, sums.counts, WEIGHTS, EVERYONE)
    assert found[-1].shrinkage > 0.85
    assert abs(cosines(gram)[0, 1]) < 0.3
    assert cosines(estimate.gram)[0, 1] < -0.4
    assert cosines(TRUTH)[0, 1] == pytest.approx(-0.555, abs=1e-3)


@pytest.mark.parametrize("ema", [0.5, 0.95, None])
def test_every_matrix_is_a_gram_matrix_that_the_solver_takes(ema):
    for estimate in after(60, 3, ema)[1]:
        assert 0.0 <= estimate.shrinkage <= 1.0
        assert np.linalg.eigvalsh(estimate.gram)[0] >= -1e-9 * np.trace(estimate.gram)
        assert solve_dual(estimate.gram, WEIGHTS, 0.4).status == "ok"


def test_gradients_that_shrink_do_not_let_old_steps_dominate():
    """Coefficients depend on ratios, and these are what they are without the shrinking."""
    shrinking = after(150, scale=lambda t: 0.97**t)[1][-1]
    steady = after(150)[1][-1]
    assert np.trace(shrinking.mean) < 1e-3 * np.trace(steady.mean)
    np.testing.assert_allclose(cosines(shrinking.gram), cosines(steady.gram), atol=0.15)
    assert shrinking.shrinkage == pytest.approx(steady.shrinkage, abs=0.1)


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_units_do_not_matter(factor):
    one, other = after(30)[1][-1], after(30, scale=lambda t: factor)[1][-1]
    assert other.shrinkage == pytest.approx(one.shrinkage, rel=1e-9)
    np.testing.assert_allclose(other.gram, factor**2 * one.gram, rtol=1e-9)
    np.testing.assert_allclose(other.noise_scale, one.noise_scale, rtol=1e-6)


@pytest.mark.parametrize("size", [3.0, 100.0, 1e6])
def test_one_step_alone_proves_nothing(size):
    """However large it is, it is not taken for a conflict, and the next ones are back."""
    expected, _ = after(100)
    draw = np.random.default_rng(5)
    gram, sums = batch(draw)
    outlier = size * np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) * TRACE
    before = expected.estimate(gram, sums.counts, WEIGHTS, EVERYONE)
    expected.take(sums.products + outlier, sums)
    after_it = expected.estimate(gram, sums.counts, WEIGHTS, EVERYONE)
    prior = 1.4 * WEIGHTS
    usual, moved = abs(coefficients(before) - prior), abs(coefficients(after_it) - prior)
    assert usual.max() > 0.05
    assert moved.max() <= usual.max() + 0.02
    if size > 10:
        assert after_it.shrinkage < 0.1


def test_coefficients_grow_from_the_prior_in_small_steps():
    estimates = after(60, 7)[1]
    found = np.array([coefficients(estimate) for estimate in estimates])
    unshrunk = np.array([solve_dual(e.gram, WEIGHTS, 0.4).coefficients for e in estimates])
    np.testing.assert_allclose(found[0], 1.4 * WEIGHTS)
    assert abs(found[-1] - found[0]).max() > 0.05
    steps, wild = abs(np.diff(found, axis=0)).max(1), abs(np.diff(unshrunk, axis=0)).max(1)
    assert steps[:20].max() < 0.1 < 0.25 < wild[:20].max()
    assert steps.max() < wild.max() / 2


def test_noise_alone_stays_at_the_prior():
    draw, expected = np.random.default_rng(2), ExpectedGram(3, 0.95)
    shares = []
    for _ in range(200):
        v = draw.standard_normal((SAMPLES, 3, 40)) / SAMPLES
        own, total = np.einsum("bid,bjd->ij", v, v), v.sum(0)
        sums = SampleSums(own, np.full(3, 8.0), np.full((3, 3), 8.0), SAMPLES)
        expected.take(total @ total.T, sums)
        estimate = expected.estimate(total @ total.T, sums.counts, WEIGHTS, EVERYONE)
        shares.append(estimate.shrinkage)
    assert np.mean(shares) < 0.25


def test_an_entry_that_a_step_does_not_have_is_not_taken():
    expected, _ = after(30)
    before = json.loads(json.dumps(expected.state()))
    gram, sums = batch(np.random.default_rng(8))
    one_label = np.array([8.0, 8.0, 1.0])
    common = np.minimum.outer(one_label, one_label)
    expected.take(gram, SampleSums(sums.products, one_label, common, SAMPLES))
    now = expected.state()
    assert now["mean"][2][2] == before["mean"][2][2]
    assert now["count"][2][2] == before["count"][2][2] == 30
    assert now["mean"][0][0] != before["mean"][0][0]
    assert now["count"][0][2] == 31


def test_of_an_objective_never_seen_nothing_is_believed():
    draw, expected = np.random.default_rng(0), ExpectedGram(3, 0.95)
    for _ in range(50):
        gram, sums = batch(draw)
        counts = np.array([8.0, 8.0, 0.0])
        common = np.minimum.outer(counts, counts)
        gram[2] = gram[:, 2] = sums.products[2] = sums.products[:, 2] = 0.0
        expected.take(gram, SampleSums(sums.products, counts, common, SAMPLES))
    estimate = expected.estimate(gram, counts, WEIGHTS, EVERYONE)
    assert estimate.shrinkage == 0.0
    assert is_no_conflict(estimate.gram)
    assert np.isnan(estimate.mean[2]).all()
    assert np.isfinite(estimate.mean[:2, :2]).all()
    among = expected.estimate(gram, counts, np.array([0.6, 0.4, 0.0]), [0, 1])
    assert among.shrinkage > 0.5
    assert not among.gram[2].any()


def test_it_goes_on_from_its_state_to_the_bit_and_in_another_order():
    whole, _ = after(40, 4, None)
    expected, _ = after(25, 4, None)
    resumed = ExpectedGram(3, None)
    resumed.restore(json.loads(json.dumps(expected.state())), EVERYONE)
    turned = ExpectedGram(3, None)
    places = [2, 0, 1]
    turned.restore(expected.state(), places)
    draw = np.random.default_rng(4)
    for t in range(40):
        gram, sums = batch(draw)
        if t >= 25:
            resumed.take(gram, sums)
            own = sums.products[np.ix_(places, places)]
            moved = SampleSums(own, sums.counts, sums.common, SAMPLES)
            turned.take(gram[np.ix_(places, places)], moved)
    assert resumed.state() == whole.state()
    np.testing.assert_allclose(
        turned.state()["mean"], np.array(whole.state()["mean"])[np.ix_(places, places)]
    )
    assert ExpectedGram(3).state() == {}
    with pytest.raises(ValueError, match="`gram_state` must have"):
        ExpectedGram(2).restore(whole.state(), [0, 1])


def test_its_length_comes_from_the_noise():
    """Little noise: 20 steps; much: up to 200."""
    quiet = ExpectedGram(1)
    loud = ExpectedGram(1)
    draw = np.random.default_rng(0)
    for _ in range(400):
        for expected, deviation in ((quiet, 0.05), (loud, 5.0)):
            x = 1.0 + deviation * draw.standard_normal()
            sums = SampleSums(np.ones((1, 1)), np.array([2.0]), np.array([[2.0]]), 2)
            expected.take(np.array([[1.0 + x / 2]]), sums)
    lengths = [
        e.estimate(np.ones((1, 1)), np.array([2.0]), np.ones(1), [0]).steps for e in (quiet, loud)
    ]
    assert lengths[0] == pytest.approx(20, rel=0.1)
    assert lengths[1] > 100


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gram": "ema"}, ValueError, "`gram` must be 'batch'"),
        ({"gram": "unbiased", "c_mode": "both"}, ValueError, "`c_mode` must be 'batch' or"),
        ({"gram": "unbiased", "gram_ema": 1.0}, ValueError, r"`gram_ema` must be in \(0, 1\)"),
        ({"gram": "unbiased", "gram_ema": "0.9"}, TypeError, "`gram_ema` must be a number"),
        ({"gram_ema": 0.9}, ValueError, "`gram_ema` and `c_mode` are of gram='unbiased'"),
        ({"c_mode": "signal"}, ValueError, "set gram='unbiased'"),
    ],
)
def test_options_out_of_their_range(options, error, match):
    with pytest.raises(error, match=match):
        GramOptions(**options)


def test_where_batches_correct_another_objective_than_the_one_that_loses():
    """Norms, conflicts and noise of the sizes that pairs of people's preferences have.

    The first two objectives share no pair, and the third, whose gradient is the longest, is against
    the first: all of the correction belongs to the first, and batches of 16 give most to the third.
    """
    H = np.array([[23.1, -18.3, -52.6], [-18.3, 14.0, 36.0], [-52.6, 36.0, 129.0]])
    values, V = np.linalg.eigh(H)
    g = (V * np.sqrt(np.maximum(values, 0.0)))[:, None]  # [m, 1, 3]
    noise, dimensions, n = 9000.0, 60, 16
    draw, expected, weights = np.random.default_rng(0), ExpectedGram(3), np.array([0.35, 0.35, 0.3])
    found, of_batch = [], []
    for t in range(250):
        labels = np.where(draw.random((3, n)) < 0.5, -1.0, 1.0)
        first = draw.random(n) < 0.5
        labels[0] *= first
        labels[1] *= ~first
        there = (labels != 0).astype(float)
        pairs = draw.standard_normal((n, dimensions)) * np.sqrt(noise / dimensions)
        v = labels[:, :, None] * pairs
        v[:, :, :3] += there[:, :, None] * g
        v /= there.sum(1)[:, None, None]
        total = v.sum(1)
        own, gram = np.einsum("ibd,jbd->ij", v, v, optimize=True), total @ total.T
        sums = SampleSums(own, there.sum(1), there @ there.T, n)
        expected.take(gram, sums)
        if t >= 150:
            estimate = expected.estimate(gram, sums.counts, weights, EVERYONE)
            solution = solve_dual(estimate.gram, weights, 0.4)
            found.append(solution.along(torch.from_numpy(gram), estimate, "batch").p_clipped)
            of_batch.append(solve_dual(gram, weights, 0.4).p_clipped)
    truth = solve_dual(g[:, 0] @ g[:, 0].T, weights, 0.4).p_clipped
    assert truth[1:].max() == 0.0 < truth[0]
    shares, batch_shares = (np.mean(p / np.sum(p, 1, keepdims=True), 0) for p in (found, of_batch))
    assert shares[0] > 0.7
    assert batch_shares[2] > 0.5 > 0.35 > batch_shares[0]
