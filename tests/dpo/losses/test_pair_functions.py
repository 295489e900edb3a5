"""Losses that are functions of h(a) - h(b): both responses of a pair have one direction in A."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_scores import make_scores
from torch import Tensor

from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.losses.pair_scores import PairScores
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.registry import LOSSES, make_loss
from raco_fast.dpo.run.batching import why_not_shared
from raco_fast.engine.sequences import Factored

B = 7
OBJECTIVES = ("x", "y", "z")
SHARED = [name for name in LOSSES if make_loss(name).pair_function is not None]
APART = [name for name in LOSSES if name not in SHARED]

_seeds = st.integers(0, 10**6)
_few = settings(max_examples=25, deadline=None)


def columns(
    losses: dict[str, PreferenceLoss], seed: int, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """A [m, 2B] for random scores and labels, soft ones where all losses know them."""
    draw = torch.Generator().manual_seed(seed)
    scores = make_scores(B, seed, dtype)
    soft = all(loss.soft for loss in losses.values()) and seed % 2
    labels = {}
    for name in losses:
        label = torch.randint(-1, 2, (B,), generator=draw).float()
        labels[name] = label * (0.5 + 0.5 * torch.rand(B, generator=draw)) if soft else label
    leaf = torch.cat([scores.logps_a, scores.logps_b]).detach().mul(scale).requires_grad_()
    known = torch.cat([scores.ref_logps_a, scores.ref_logps_b]).mul(scale)
    of_pairs = PairScores(
        *leaf.chunk(2), *known.chunk(2), scores.tokens_a.to(dtype), scores.tokens_b.to(dtype)
    )
    found = preference_losses(of_pairs, labels, loss=losses)
    rows = [
        torch.autograd.grad(x, leaf)[0] if x.requires_grad else torch.zeros_like(leaf)
        for x in found.values()
    ]
    return torch.stack(rows).double()


def apart(A: Tensor) -> float:
    """The largest share of a response's column that is not along the other's, in any pair.

    |u|² |v|² - (u·v)² is zero for parallel columns; by cross products, which lose no digits.
    """
    a, b = A[:, :B], A[:, B:]
    size = a.norm(dim=0) * b.norm(dim=0)
    cross = torch.stack([(a[i] * b[j] - a[j] * b[i]) for i, j in combinations(range(len(A)), 2)])
    return float(torch.where(size > 0, cross.norm(dim=0) / size, 0.0).max())


def pairs() -> list[tuple[int, int]]:
    return [(k, B + k) for k in range(B)]


@pytest.mark.parametrize("name", SHARED)
@_few
@given(seed=_seeds)
def test_the_responses_of_a_pair_have_one_direction(name, seed):
    """In float64 to its rounding; in float32 near enough to share a group, so one pass serves."""
    losses = dict.fromkeys(OBJECTIVES, make_loss(name))
    assert why_not_shared(losses) is None
    assert apart(columns(losses, seed, torch.float64)) < 1e-12
    for scale in (1.0, 0.01, 10.0):
        A = columns(losses, seed, torch.float32, scale)
        assert Factored.of(A, pairs()).apart(pairs()) is None, scale


@pytest.mark.parametrize("name", APART)
def test_other_losses_have_pairs_with_two_directions(name):
    losses = dict.fromkeys(OBJECTIVES, make_loss(name))
    assert max(apart(columns(losses, seed, torch.float64)) for seed in range(20)) > 1e-3
    found = [Factored.of(columns(losses, seed, torch.float32), pairs()) for seed in range(20)]
    assert any(factored.apart(pairs()) is not None for factored in found)
    assert why_not_shared(losses) == f"the loss {name!r} of 'x' is no function of h(a) - h(b)"


@pytest.mark.parametrize(("one", "other"), list(combinations(SHARED, 2)))
def test_losses_of_one_h_mix_and_others_are_told(one, other):
    losses = {"x": make_loss(one), "y": make_loss(other), "z": make_loss(one)}
    reason = why_not_shared(losses)
    if losses["x"].tail_weight != losses["y"].tail_weight:
        assert reason is None  # each has scores of its own
        return
    widest = max(apart(columns(losses, seed, torch.float64)) for seed in range(10))
    if reason is None:
        assert widest < 1e-12
        for seed in range(10):
            A = columns(losses, seed, torch.float32)
            assert Factored.of(A, pairs()).apart(pairs()) is None
    else:
        assert reason == "the losses of 'x' and 'y' see a pair through different scores"
        assert widest > 1e-3


def test_a_loss_that_sees_no_pair_is_named_with_its_objective():
    losses = {"kind": make_loss("sigmoid"), "short": make_loss("orpo")}
    assert why_not_shared(losses) == "the loss 'orpo' of 'short' is no function of h(a) - h(b)"
    assert why_not_shared({"kind": make_loss("sigmoid"), "short": make_loss("simpo")}) == (
        "the losses of 'kind' and 'short' see a pair through different scores"
    )


def test_options_that_change_h_are_of_another_h():
    alpha = [make_loss({"name": "alpha", "alpha": value}) for value in (0.3, 0.6)]
    assert why_not_shared(dict(zip("xy", alpha, strict=True))) is not None
    beta = [make_loss({"name": "alpha", "beta": value}) for value in (0.1, 0.5)]
    assert why_not_shared(dict(zip("xy", beta, strict=True))) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", SHARED)
def test_scores_that_are_not_finite_reach_every_gradient_that_they_are_in(name, bad):
    A = columns(dict.fromkeys(OBJECTIVES, make_loss(name)), 3, torch.float32)
    A[1, [2, B + 2]] = bad
    factored = Factored.of(A, pairs())
    assert min(factored.group[2], factored.group[B + 2]) >= 0
    back = factored.coefficients[:, factored.group[2]] * factored.seeds[2]
    assert not torch.isfinite(back[1])
