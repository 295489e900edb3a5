"""`mode="auto"`: both ways take turns, then the faster one is kept."""

from itertools import accumulate, chain

import pytest
import torch
from torch import nn

import raco_fast
from raco_fast.gradients import faster_mode
from raco_fast.gradients.objective_gradients import ObjectiveGradients

TURNS = 2 * faster_mode._TRIALS


@pytest.fixture
def loop():
    """(gradients, a call of backward that returns which way it took)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    raco_fast.prepare(model, strict=True, check_every=None)
    gradients, took = ObjectiveGradients(model.parameters(), [0.5, 0.5]), []
    propagate = gradients._propagate

    def noted(losses, scores, in_one, said):
        took.append("one_backward" if in_one else "autograd")
        propagate(losses, scores, in_one, said)

    gradients._propagate = noted
    x = torch.randn(5, 4)

    def backward() -> str:
        gradients.zero()
        scores = model(x).sum(1)
        gradients.backward([scores.sin().sum(), scores.square().sum()], scores=scores, mode="auto")
        return took[-1]

    return gradients, backward


def clock(monkeypatch: pytest.MonkeyPatch, one: float, each: float) -> None:
    """Time passes by so much in every call, and by ten times as much in the first of each."""
    late = [10 * one, 10 * each]
    spans = chain(late, [one, each] * (faster_mode._TRIALS - 1))
    ticks = accumulate(chain.from_iterable((0.0, span) for span in spans))
    monkeypatch.setattr(faster_mode, "_now", lambda device: next(ticks))


@pytest.mark.parametrize(("one", "each", "kept"), [(1, 2, "one_backward"), (3, 2, "autograd")])
def test_the_faster_mode_is_kept(monkeypatch, loop, one, each, kept):
    gradients, backward = loop
    clock(monkeypatch, one, each)
    assert [backward() for _ in range(TURNS)] == list(faster_mode.MODES) * faster_mode._TRIALS
    assert gradients.faster_mode.kept == kept
    assert {backward() for _ in range(3)} == {kept}


def test_all_turns_give_the_same_gradients(loop):
    gradients, backward = loop
    found = []
    for _ in range(TURNS + 1):
        backward()
        found.append([g.clone() for p in gradients.parameters() for g in p.grad.buffers])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])


def test_it_needs_scores(loop):
    gradients, _ = loop
    p = gradients.parameters()[0]
    with pytest.raises(ValueError, match="`scores` must be given in mode 'auto'"):
        gradients.backward([p.sum(), p.square().sum()], mode="auto")
    with pytest.raises(ValueError, match="'autograd', 'one_backward' or 'auto', got 'fast'"):
        gradients.backward([p.sum(), p.square().sum()], mode="fast")
