"""Losses and reward margins against formulas written independently in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raco_fast.dpo.losses import (
    LOSSES,
    LossOptions,
    PairScores,
    preference_losses,
    preference_margins,
)

OPTIONS = LossOptions(beta=0.3, simpo_gamma=0.7)


def make_scores(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> PairScores:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    logps_a, logps_b = draw(9.0) - 30, draw(9.0) - 40
    return PairScores(
        logps_a.requires_grad_(),
        logps_b.requires_grad_(),
        logps_a.detach() + draw(2.0),
        logps_b.detach() + draw(2.0),
        torch.arange(3, 3 + n).to(dtype),
        torch.arange(7, 7 + 2 * n, 2).to(dtype),
    )


def plain_loss(name: str, options: LossOptions, sign: int, pair: tuple[float, ...]) -> float:
    """One pair's loss in Python floats: chosen and rejected by name, not by sign arithmetic."""
    a, b = (pair[0], pair[2], pair[4]), (pair[1], pair[3], pair[5])
    (pi_w, ref_w, n_w), (pi_l, ref_l, n_l) = (a, b) if sign > 0 else (b, a)
    beta, eps = options.beta, options.label_smoothing
    delta = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    if name == "sigmoid":
        right, wrong = 1 / (1 + math.exp(-delta)), 1 / (1 + math.exp(delta))
        return -(1 - eps) * math.log(right) - eps * math.log(wrong)
    if name == "hinge":
        return max(0.0, 1 - delta)
    if name == "ipo":
        return ((pi_w - ref_w) / n_w - (pi_l - ref_l) / n_l - 1 / (2 * beta)) ** 2
    assert name == "simpo"
    return math.log1p(math.exp(-(beta * (pi_w / n_w - pi_l / n_l) - options.simpo_gamma)))


def row(scores: PairScores, k: int) -> tuple[float, ...]:
    fields = (
        scores.logps_a,
        scores.logps_b,
        scores.ref_logps_a,
        scores.ref_logps_b,
        scores.tokens_a,
        scores.tokens_b,
    )
    return tuple(field[k].item() for field in fields)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, OPTIONS) for name in sorted(LOSSES)), ("sigmoid", LossOptions(0.2, 0.15))],
)
def test_each_loss_and_its_gradient_against_plain_python(name, options):
    scores = make_scores(7, dtype=torch.float64)
    label = torch.tensor([1, -1, 0, 1, -1, -1, 0])
    loss = preference_losses(scores, {"x": label}, loss=name, options=options)["x"]
    chosen = [k for k in range(7) if label[k] != 0]
    expected = sum(plain_loss(name, options, int(label[k]), row(scores, k)) for k in chosen) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-12)

    grad_a, grad_b = torch.autograd.grad(loss, [scores.logps_a, scores.logps_b])
    step = 1e-5
    for k in range(7):
        for side, grad in enumerate((grad_a, grad_b)):
            if label[k] == 0:
                assert grad[k] == 0
                continue
            up, down = list(row(scores, k)), list(row(scores, k))
            up[side] += step
            down[side] -= step
            sign = int(label[k])
            slope = plain_loss(name, options, sign, tuple(up))
            slope -= plain_loss(name, options, sign, tuple(down))
            assert float(grad[k]) == pytest.approx(slope / (2 * step) / 5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_float32_is_as_good_as_its_inputs_allow(name):
    exact, rounded = make_scores(50, dtype=torch.float64), make_scores(50)
    label = torch.ones(50)
    true = preference_losses(exact, {"x": label}, loss=name, options=OPTIONS)["x"]
    ours = preference_losses(rounded, {"x": label}, loss=name, options=OPTIONS)["x"]
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(true.item(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_flipping_a_label_is_swapping_the_responses(name):
    scores = make_scores(5)
    swapped = PairScores(
        scores.logps_b,
        scores.logps_a,
        scores.ref_logps_b,
        scores.ref_logps_a,
        scores.tokens_b,
        scores.tokens_a,
    )
    label = torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0])
    flipped = preference_losses(scores, {"x": -label}, loss=name, options=OPTIONS)["x"]
    other = preference_losses(swapped, {"x": label}, loss=name, options=OPTIONS)["x"]
    unflipped = preference_losses(scores, {"x": label}, loss=name, options=OPTIONS)["x"]
    assert flipped.item() == pytest.approx(other.item(), rel=1e-6)
    assert flipped.item() != pytest.approx(unflipped.item(), rel=1e-2)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_nan_in_an_unlabelled_pair_does_not_leak(name):
    scores = make_scores(4)
    with torch.no_grad():
        scores.logps_a[2] = torch.nan
        scores.ref_logps_b[2] = torch.inf
        scores.tokens_b[2] = 0
    losses = preference_losses(
        scores,
        {"x": torch.tensor([1, -1, 0, 1]), "y": torch.tensor([0, 0, 1, 0])},
        loss=name,
        options=OPTIONS,
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
    same = PairScores(
        scores.logps_a,
        scores.logps_b,
        scores.logps_a.detach(),
        scores.logps_b.detach(),
        scores.tokens_a,
        scores.tokens_b,
    )
    loss = preference_losses(same, {"x": torch.ones(6)}, options=LossOptions(0.1, 0.2))["x"]
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_margins_are_beta_times_the_log_ratios_without_a_graph():
    scores, label = make_scores(4), torch.tensor([1.0, -1.0, -1.0, 1.0])
    chosen, rejected = preference_margins(scores, label, beta=0.25)
    assert not chosen.requires_grad
    for k in range(4):
        a, b, ref_a, ref_b, *_ = row(scores, k)
        won, lost = (a - ref_a, b - ref_b) if label[k] > 0 else (b - ref_b, a - ref_a)
        assert float(chosen[k]) == pytest.approx(0.25 * won, rel=1e-5)
        assert float(rejected[k]) == pytest.approx(0.25 * lost, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"`beta` must be positive and finite, got 0.0"),
        ({"beta": math.inf}, r"`beta` must be positive and finite, got inf"),
        ({"beta": math.nan}, r"`beta` must be positive and finite, got nan"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, r"`label_smoothing` must be in"),
        ({"simpo_gamma": math.nan}, r"`simpo_gamma` must be finite, got nan"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**options)


def test_errors_name_what_is_wrong():
    scores = make_scores(3)
    with pytest.raises(ValueError, match=r"`loss` must be one of \['hinge', .* got 'dpo'"):
        preference_losses(scores, {"x": torch.ones(3)}, loss="dpo")
    with pytest.raises(ValueError, match=r"labels\['x'\] must have one entry a pair, shape \(3,\)"):
        preference_losses(scores, {"x": torch.ones(4)})
    with pytest.raises(ValueError, match=r"`counts` must hold every objective .* for \['y'\]"):
        preference_losses(scores, {"x": torch.ones(3), "y": torch.ones(3)}, counts={"x": 3})
    with pytest.raises(ValueError, match="`label_smoothing` is defined for the loss 'sigmoid'"):
        preference_losses(
            scores, {"x": torch.ones(3)}, loss="ipo", options=LossOptions(label_smoothing=0.1)
        )
