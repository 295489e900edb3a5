"""Rules at work: in every mode, over micro-batches, with a memory, with losses, without some."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast.solver.registry import OURS

WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}
COUNTING = ("pcgrad", "gradvac", "pcd", "cr-mogm")
STATEFUL = (*COUNTING, "sdmgrad", "modo")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    raco_fast.prepare(model, check_every=None)
    return model


def losses_of(model: nn.Module, t: int, part: slice = slice(None)) -> tuple[dict, Tensor]:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float64)[part]
    y = model(x)
    wanted = {"a": x[:, 0], "b": -x[:, 0] + x[:, 1], "c": 0.5 * x[:, 2]}
    return {name: 1e-3 + (y - target).square().sum() / 12 for name, target in wanted.items()}, y


def truth(model: nn.Module, t: int, rule, state) -> raco_fast.DualSolution:
    losses, _ = losses_of(model, t)
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(x, model.parameters(), retain_graph=True)]
        )
        for x in losses.values()
    ]
    G = torch.stack(rows)
    values = [float(x.detach()) for x in losses.values()]
    return raco_fast.solve_dual(G @ G.T, WEIGHTS, 0.4, rule, losses=values, state=state)


def by_autograd(opt, model, t):
    opt.backward(losses_of(model, t)[0])


def by_micro_batches(opt, model, t):
    for part in (slice(0, 6), slice(6, 12)):
        losses, scores = losses_of(model, t, part)
        # The constant belongs to both halves; a sum over micro-batches has it once.
        opt.backward({n: x - (part.start > 0) * 1e-3 for n, x in losses.items()}, scores=scores)


def by_gram_first(opt, model, t):
    losses, scores = losses_of(model, t)
    opt.backward(losses, scores=scores, mode="gram_first")


def by_keep_dy(opt, model, t):
    losses, scores = losses_of(model, t)
    opt.backward(losses, scores=scores, mode="gram_first", keep_dy=True)


@pytest.mark.parametrize("mode", [by_autograd, by_micro_batches, by_gram_first, by_keep_dy])
@pytest.mark.parametrize("name", OURS)
def test_every_rule_in_every_mode(name, mode):
    """Coefficients of three steps against `solve_dual` on gradients of torch.autograd.grad."""
    model, state = network(), None
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), lr=0.05, weights=WEIGHTS, rule=name)
    for t in range(3):
        expected = truth(model, t, name, state)
        state = expected.state
        mode(opt, model, t)
        opt.step()
        opt.zero_grad()
        found = opt.solution
        np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-7, atol=1e-9)
        assert found.rule == name
    assert bool(opt.rule_state) == (name in STATEFUL)
    if name in COUNTING:
        assert opt.rule_state["values"]["steps"] == 3.0


@pytest.mark.parametrize("mode", [by_micro_batches, by_gram_first])
@pytest.mark.parametrize("clip", [{"clip": "inside", "kappa": 1.4}, {"clip": "smooth", "q": 1.0}])
def test_other_clips_in_a_step_and_a_checkpoint(clip, mode):
    rule = {"name": "cagrad-clip", **clip}
    model = network()
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), lr=0.05, weights=WEIGHTS, rule=rule)
    expected = truth(model, 15, rule, None)
    mode(opt, model, 15)
    opt.step()
    np.testing.assert_allclose(opt.solution.coefficients, expected.coefficients, rtol=1e-7)
    paper = truth(network(), 15, "cagrad-clip", None).coefficients
    assert abs(opt.solution.coefficients - paper).max() > 1e-3
    again = raco_fast.ClippedCAGradAdamW(network().parameters(), weights=WEIGHTS)
    again.load_state_dict(opt.state_dict())
    assert again.rule == opt.rule == rule


@pytest.mark.parametrize("name", ["nash", "gradvac", "mgda-decoupled"])
@pytest.mark.parametrize("gram_first", [False, True])
def test_combine_and_gram_first_for_another_optimizer(name, gram_first):
    model, state = network(), None
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = raco_fast.ObjectiveGradients(
        model.parameters(), WEIGHTS, keep_losses=not gram_first
    )
    for t in range(3):
        expected = truth(model, t, name, state)
        state = expected.state
        losses, scores = losses_of(model, t)
        if gram_first:
            found = raco_fast.gram_first(gradients, losses, scores, rule=name)
        else:
            gradients.backward(losses)
            found = raco_fast.combine(gradients, rule=name)
        np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-9)
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert float(norm) == pytest.approx(expected.update_norm, rel=1e-9)
        sgd.step()
        model.zero_grad()  # not ours: the losses of the step must be forgotten all the same


@pytest.mark.parametrize("name", STATEFUL)
def test_a_skipped_step_leaves_the_state_alone(name):
    model = network()
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, rule=name)
    by_autograd(opt, model, 0)
    opt.step()
    opt.zero_grad()
    before = opt.rule_state
    losses, _ = losses_of(model, 1)
    opt.backward({n: x * (float("nan") if n == "b" else 1.0) for n, x in losses.items()})
    opt.step()
    assert not opt.solution.finite
    assert opt.skipped_steps == 1
    assert opt.rule_state == before
    assert before["values"]


@pytest.mark.parametrize("name", OURS)
def test_an_objective_of_weight_zero_without_a_loss(name):
    """It is no part of the problem, and what a rule remembers of it stays."""
    model = network()
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, rule=name)
    by_autograd(opt, model, 0)
    opt.step()
    opt.zero_grad()
    opt.weights = {"a": 0.6, "b": 0.0, "c": 0.4}
    before = opt.rule_state
    losses, _ = losses_of(model, 1)
    opt.backward({"a": losses["a"], "c": losses["c"]})
    opt.step()
    assert opt.solution.coefficients[1] == 0.0
    assert opt.solution.coefficients[[0, 2]].abs().max() > 0.0
    if name in STATEFUL:
        for key, old in before["values"].items():
            new, old = np.array(opt.rule_state["values"][key]), np.array(old)
            if old.ndim == 0:
                assert new == old + 1.0
                continue
            untouched = np.zeros(3, bool)
            untouched[1] = True
            mask = untouched if old.ndim == 1 else untouched[:, None] | untouched
            np.testing.assert_array_equal(new[mask], old[mask])
            assert (new[~mask] != old[~mask]).any()


def test_losses_that_were_not_seen():
    model = network()
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, rule="mgda-decoupled")
    losses, _ = losses_of(model, 0)
    opt.backward(losses)
    with opt.objective("b"):
        losses_of(model, 1)[0]["b"].backward()
    message = (
        r"mgda-decoupled needs the losses, and those of \['b'\] were not seen; pass them to ba"
    )
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    opt.zero_grad()
    opt.backward(losses_of(model, 1)[0])
    opt.step()  # a new step has forgotten it
    gradients = raco_fast.ObjectiveGradients(model.parameters(), WEIGHTS)
    model.zero_grad()
    gradients.backward(losses_of(model, 0)[0])
    with pytest.raises(
        RuntimeError, match=r"not seen; .* for `combine` build Objective.*keep_losses=True"
    ):
        raco_fast.combine(gradients, rule="mgda-decoupled")


def test_a_rule_set_later_needs_losses_from_then_on():
    model = network()
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS)
    by_autograd(opt, model, 0)
    opt.rule = "mgda-decoupled"
    with pytest.raises(RuntimeError, match=r"those of \['a', 'b', 'c'\] were not seen"):
        opt.step()
    opt.zero_grad()
    by_autograd(opt, model, 0)
    opt.step()
    assert opt.solution.rule == "mgda-decoupled"


def test_a_loss_changed_in_place_after_its_backward_pass():
    model = network()
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, rule="mgda-decoupled")
    expected = truth(model, 0, "mgda-decoupled", None)
    losses, _ = losses_of(model, 0)
    opt.backward(losses)
    with torch.no_grad():
        for loss in losses.values():
            loss.mul_(0.0)
    opt.step()
    np.testing.assert_allclose(opt.solution.coefficients, expected.coefficients, rtol=1e-9)
