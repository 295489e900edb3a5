"""One scalar per objective: which pairs count, and how they are averaged."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_scores import make_scores, swapped

from raco_fast.dpo.losses.margin_losses import Ipo, Sigmoid
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.losses.pair_scores import PairScores
from raco_fast.dpo.losses.registry import LOSSES, make_loss


@pytest.mark.parametrize("name", LOSSES)
def test_flipping_a_label_is_swapping_the_responses(name):
    scores, loss = make_scores(5), make_loss(name)
    label = torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0])
    flipped = preference_losses(scores, {"x": -label}, loss=loss)["x"]
    other = preference_losses(swapped(scores), {"x": label}, loss=loss)["x"]
    unflipped = preference_losses(scores, {"x": label}, loss=loss)["x"]
    assert flipped.item() == pytest.approx(other.item(), rel=1e-6)
    assert flipped.item() != pytest.approx(unflipped.item(), rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_in_an_unlabelled_pair_does_not_leak(name):
    scores = make_scores(4)
    with torch.no_grad():
        scores.logps_a[2] = torch.nan
        scores.ref_logps_b[2] = torch.inf
        scores.tokens_b[2] = 0
    losses = preference_losses(
        scores,
        {"x": torch.tensor([1, -1, 0, 1]), "y": torch.tensor([0, 0, 1, 0])},
        loss=make_loss(name),
    )
    assert losses["x"].isfinite()
    assert not losses["y"].isfinite()
    for grad in torch.autograd.grad(losses["x"], [scores.logps_a, scores.logps_b]):
        assert grad.isfinite().all()
        assert grad[2] == 0


@given(st.integers(0, 10_000), st.lists(st.sampled_from([-1, 0, 1]), min_size=8, max_size=8))
def test_counts_make_one_batch_of_eight_equal_to_eight_of_one(seed, signs):
    scores, label = make_scores(8, seed, torch.float64), torch.tensor(signs)
    counts = {"x": int((label != 0).sum())}
    parts = [
        preference_losses(scores[torch.tensor([k])], {"x": label[k : k + 1]}, counts=counts)["x"]
        for k in range(8)
    ]
    whole = preference_losses(scores, {"x": label})["x"]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
    # A mean over the pairs of each micro-batch would be another number.
    assert counts["x"] == 0 or whole > 0


def test_an_objective_without_labels_is_a_constant_zero():
    losses = preference_losses(
        make_scores(3), {"x": torch.tensor([1, 0, -1]), "empty": torch.zeros(3)}
    )
    assert losses["x"].requires_grad
    assert not losses["empty"].requires_grad
    assert losses["empty"].item() == 0.0


def test_at_the_reference_the_dpo_loss_is_log_two():
    scores = make_scores(6)
    logps = (scores.logps_a, scores.logps_b)
    same = PairScores(*logps, *(x.detach() for x in logps), scores.tokens_a, scores.tokens_b)
    loss = preference_losses(same, {"x": torch.ones(6)}, loss=Sigmoid(0.1, 0.2))["x"]
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_every_objective_has_its_own_loss():
    scores, label = make_scores(5), torch.tensor([1, -1, 1, 0, 1])
    both = {"x": Sigmoid(0.3), "y": Ipo(0.2)}
    losses = preference_losses(scores, {"x": label, "y": -label}, loss=both)
    assert losses["x"] == preference_losses(scores, {"x": label}, loss=both["x"])["x"]
    assert losses["y"] == preference_losses(scores, {"y": -label}, loss=both["y"])["y"]


def test_errors_name_what_is_wrong():
    scores = make_scores(3)
    with pytest.raises(ValueError, match=r"labels\['x'\] must have one entry a pair, shape \(3,\)"):
        preference_losses(scores, {"x": torch.ones(4)})
    with pytest.raises(ValueError, match=r"pair_weights\['x'\] must have one entry a pair"):
        preference_losses(scores, {"x": torch.ones(3)}, pair_weights={"x": torch.ones(4)})

    class Mean(Sigmoid):
        def __call__(self, pairs):
            return super().__call__(pairs).mean()

    with pytest.raises(ValueError, match=r"loss 'Mean' must give one number a pair, shape \(3,\)"):
        preference_losses(scores, {"x": torch.ones(3)}, loss=Mean())
    two = {"x": torch.ones(3), "y": torch.ones(3)}
    with pytest.raises(ValueError, match=r"`counts` must hold every objective .* for \['y'\]"):
        preference_losses(scores, two, counts={"x": 3})
    with pytest.raises(ValueError, match=r"`loss` must hold every objective .* for \['x'\]"):
        preference_losses(scores, two, loss={"y": Ipo()})


SOFT = [name for name, loss in LOSSES.items() if loss.soft]
HARD_ONLY = [name for name, loss in LOSSES.items() if not loss.soft]


@pytest.mark.parametrize("name", SOFT)
def test_a_soft_label_is_the_mean_over_what_it_may_be(name):
    scores, loss = make_scores(4, dtype=torch.float64), make_loss(name)
    label = torch.tensor([0.75, -0.5, 0, 1])
    ours = preference_losses(scores, {"x": label}, loss=loss)["x"]
    expected = 0.0
    for k, a_preferred in ((0, 0.75), (1, 0.5), (3, 1.0)):
        for sign, share in ((1, a_preferred), (-1, 1 - a_preferred)):
            one = torch.tensor([sign if b == k else 0 for b in range(4)])
            expected += share * preference_losses(scores, {"x": one}, loss=loss)["x"].item() / 3
    assert ours.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [n for n in SOFT if n not in ("cpo", "orpo")])
def test_the_best_margin_grows_with_the_probability(name):
    """Of losses with a likelihood term the best scores are log(q) and log(1 - q), not a margin."""
    t = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    scores, loss = PairScores(t, -t, zero, zero, one, one), make_loss(name, options={"beta": 0.5})
    best = []
    for q in (0.55, 0.7, 0.9):
        pairs = scores.ranked(t == t)
        best.append(t[(q * loss(pairs) + (1 - q) * loss(pairs.swapped())).argmin()].item())
    assert best == sorted(set(best))
    assert 0 < best[0] < best[-1] < 12


def test_cdpo_is_dpo_with_soft_labels():
    scores, label = make_scores(6), torch.ones(6)
    soft = preference_losses(scores, {"x": 0.85 * label}, loss=Sigmoid(0.3))
    smoothed = preference_losses(scores, {"x": label}, loss=Sigmoid(0.3, label_smoothing=0.15))
    assert soft["x"].item() == pytest.approx(smoothed["x"].item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_soft_label_in_closed_form(dtype):
    """Of -t log s(x) - (1-t) log s(-x), x = beta (r_a - r_b): beta (s(x) - t), and its negative."""
    draw, B, beta = torch.Generator().manual_seed(2), 200, 0.3
    a, b, ref_a, ref_b = (torch.randn(4, B, generator=draw, dtype=torch.float64) * 9).to(dtype)
    t = torch.rand(B, generator=draw, dtype=torch.float64)
    t[:3] = torch.tensor([0.5, 0.0, 1.0])
    a.requires_grad_()
    b.requires_grad_()
    ones = torch.ones(B, dtype=dtype)
    label = torch.where(t >= 0.5, t, t - 1)
    preference_losses(PairScores(a, b, ref_a, ref_b, ones, ones), {"x": label}, loss=Sigmoid(beta))[
        "x"
    ].backward()
    exact = [each.detach().double() for each in (a, b, ref_a, ref_b)]
    x = beta * ((exact[0] - exact[2]) - (exact[1] - exact[3]))
    expected = beta * (x.sigmoid() - t) / B
    assert torch.equal(b.grad, -a.grad)  # one direction a pair, to the bit
    plain = (beta * ((a - ref_a) - (b - ref_b))).detach().to(dtype)
    bound = (beta * (plain.sigmoid() - t.to(dtype)) / B).double() - expected
    assert (a.grad.double() - expected).norm() <= 2 * bound.norm() + 1e-17


@pytest.mark.parametrize("name", HARD_ONLY)
def test_soft_labels_are_refused_where_they_mean_nothing(name):
    scores, label = make_scores(3), torch.tensor([1.0, 0.0, -0.7])
    message = rf"labels of 'x' must be hard .* loss '{name}', .* use a loss .*: \['alpha', .*'sppo'"
    with pytest.raises(ValueError, match=message):
        preference_losses(scores, {"x": label}, loss=make_loss(name))


@pytest.mark.parametrize("value", [2.0, 0.3, torch.nan])
def test_a_label_that_is_no_probability_is_refused(value):
    with pytest.raises(ValueError, match=r"labels\['x'\] must be 0, or \+-q with q in \[0.5, 1\]"):
        preference_losses(make_scores(2), {"x": torch.tensor([1.0, value])})


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_multiplies_a_pairs_loss_and_not_the_divisor(name):
    scores, loss = make_scores(4, dtype=torch.float64), make_loss(name)
    label, weight = torch.tensor([1, 0, -1, 1]), torch.tensor([2.5, 7.0, 0.125, 1.0])
    ours = preference_losses(scores, {"x": label}, loss=loss, pair_weights={"x": weight})["x"]
    alone = [
        preference_losses(scores[torch.tensor([k])], {"x": label[k : k + 1]}, loss=loss)["x"]
        for k in range(4)
    ]
    expected = (2.5 * alone[0] + 0.125 * alone[2] + alone[3]) / 3
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
