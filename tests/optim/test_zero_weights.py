"""An objective of weight 0 needs no loss, and without one it is no part of the problem."""

import copy

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ClippedCAGradAdamW, ObjectiveGradients, combine, gram_first
from raco_fast.backends import choose
from raco_fast.solver import on_device

RULES = pytest.mark.parametrize("rule", ["linear", "cagrad", "cagrad-clip", "mgda"])
WEIGHTS = {"a": 0.2, "none": 0.0, "b": 0.5, "c": 0.3}
PRESENT = {"a": 0.2, "b": 0.5, "c": 0.3}
PLACES = [0, 2, 3]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))
    raco_fast.prepare(model)
    return model


def losses_of(model: nn.Module, t: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    scores = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(t)))
    return {
        "c": scores.sum(),
        "a": scores[:3].sin().sum(),
        "b": (scores - 1).square().sum(),
    }, scores


def backward(target, losses, scores, mode: str, **options) -> None:
    if mode == "objective":
        for name, loss in losses.items():
            with target.objective(name):
                loss.backward(retain_graph=True)
    else:
        target.backward(losses, scores=scores, mode=mode, **options)


def check_embedded(solution, part) -> None:
    """The solution is that of the objectives present, with zeros for the other."""
    assert solution.names == tuple(WEIGHTS)
    assert solution.weights.tolist() == list(WEIGHTS.values())
    for name in ("p", "p_clipped", "coefficients"):
        values = getattr(solution, name)
        torch.testing.assert_close(values[PLACES], getattr(part, name), rtol=1e-5, atol=1e-7)
        assert values[1] == 0.0
    for name in ("gap", "value", "g0_norm", "gp_norm", "update_norm"):
        assert getattr(solution, name) == pytest.approx(getattr(part, name), rel=1e-5, abs=1e-9)
    assert not solution.gram[1].any()
    assert not solution.gram[:, 1].any()
    torch.testing.assert_close(solution.gram[PLACES][:, PLACES], part.gram, rtol=1e-5, atol=1e-6)
    assert not solution.cosines[1].any()
    assert solution.clip_active is part.clip_active
    assert (solution.status, solution.finite, solution.converged) == ("ok", True, True)
    assert "none: 0," in repr(solution)


@RULES
@pytest.mark.parametrize("mode", ["autograd", "one_backward", "objective", "gram_first"])
def test_a_step_without_it_is_the_step_of_the_others(mode, rule):
    models, solutions = [network(), network()], []
    for model, weights in zip(models, (WEIGHTS, PRESENT), strict=True):
        opt = ClippedCAGradAdamW(
            model.parameters(),
            lr=0.05,
            weight_decay=0.1,
            weights=weights,
            c=0.6,
            rule=rule,
            max_grad_norm=0.5,
        )
        for t in range(3):
            backward(opt, *losses_of(model, t), mode)
            opt.step()
            opt.zero_grad()
        solutions.append(opt.solution)
    check_embedded(*solutions)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@RULES
@pytest.mark.parametrize("way", ["autograd", "one_backward", "two passes", "keep dy"])
def test_a_direction_without_it_is_that_of_the_others(way, rule):
    models, solutions = [network(), network()], []
    for model, weights in zip(models, (WEIGHTS, PRESENT), strict=True):
        gradients = ObjectiveGradients(model.parameters(), weights)
        losses, scores = losses_of(model)
        if "_" in way or way == "autograd":
            gradients.backward(losses, scores=scores, mode=way)
            solutions.append(combine(gradients, c=0.6, rule=rule, max_grad_norm=0.5))
        else:
            solutions.append(
                gram_first(gradients, losses, scores, c=0.6, rule=rule, keep_dy=way == "keep dy")
            )
    check_embedded(*solutions)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["autograd", "one_backward", "gram_first"])
def test_one_objective_may_be_left(mode):
    ours, theirs = network(), network()
    opt = ClippedCAGradAdamW(ours.parameters(), lr=0.1, weights={"a": 0.5, "b": 0.5}, c=0.0)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    opt.weights = {"b": 1.0, "a": 0.0}  # a schedule's end
    for t in range(3):
        losses, scores = losses_of(ours, t)
        opt.backward({"b": losses["b"]}, scores=scores, mode=mode)
        opt.step()
        opt.zero_grad()
        losses_of(theirs, t)[0]["b"].backward()
        plain.step()
        plain.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert opt.solution.coefficients.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("mode", ["autograd", "one_backward", "objective", "gram_first"])
def test_with_its_loss_it_counts(mode):
    model = network()
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, c=0.6, rule="cagrad")
    losses, scores = losses_of(model)
    conflicting = -3 * sum(PRESENT[name] * loss for name, loss in losses.items())
    backward(opt, {**losses, "none": conflicting}, scores, mode)
    opt.step()
    assert opt.solution.gram[1, 1] > 0
    assert opt.solution.p[1] > 0.5


@pytest.mark.parametrize("left_out", [False, True])
def test_the_device_solves_for_all_objectives_or_leaves_it_to_the_host(left_out, monkeypatch):
    model = network()
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS)
    opt.param_groups[0]["capturable"] = True
    taken = []
    monkeypatch.setattr(choose, "waits", lambda *args: None)
    monkeypatch.setattr(on_device, "MAX_OBJECTIVES", len(WEIGHTS))
    for name in ("_step_on_device", "_step_through_host"):
        monkeypatch.setattr(opt, name, lambda *args, name=name: taken.append(name))
    losses, scores = losses_of(model)
    opt.backward(losses if left_out else {**losses, "none": scores.sum()})
    opt.step()
    assert taken == ["_step_through_host" if left_out else "_step_on_device"]


def test_a_loss_in_one_micro_batch_is_enough_to_count():
    model = network()
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS)
    for t, more in enumerate(({}, {"none": 1.0}, {})):
        losses, scores = losses_of(model, t)
        opt.backward({**losses, **{name: x * scores.sum() for name, x in more.items()}})
    opt.step()
    assert opt.solution.gram[1, 1] > 0


def test_a_failed_backward_pass_of_it_is_no_part_of_the_step():
    model, twin = network(), network()
    opts = [ClippedCAGradAdamW(m.parameters(), weights=WEIGHTS) for m in (model, twin)]
    only_here = nn.Parameter(torch.ones(2))
    opts[0].add_param_group({"params": [only_here]})
    losses, scores = losses_of(model)

    def fail() -> None:
        with opts[0].objective("none"):
            (torch.nan * scores.sum() + only_here.sum()).backward(retain_graph=True)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for opt, m in zip(opts, (model, twin), strict=True):
        opt.backward(losses if m is model else losses_of(m)[0])
        opt.step()
    assert opts[0].solution.finite
    assert only_here not in opts[0].state
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_combine_leaves_nothing_that_only_it_touched():
    p, only_here = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    gradients = ObjectiveGradients([p, only_here], {"a": 0.5, "b": 0.5})
    gradients.backward({"a": p.sum(), "b": p.prod() + only_here.sum()})
    gradients.weights = {"a": 1.0, "b": 0.0}
    gradients._ran.discard("b")
    combine(gradients)
    assert only_here.grad is None
    torch.optim.SGD([p, only_here], lr=0.1).step()
    assert only_here.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("mode", ["autograd", "one_backward", "gram_first"])
def test_others_must_have_a_loss(mode):
    model = network()
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS)
    losses, scores = losses_of(model)
    del losses["b"]
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \[\]; correct the keys"):
        opt.backward(losses, scores=scores, mode=mode)
    with pytest.raises(ValueError, match=r"one loss for each of \('a', 'none', 'b', 'c'\), got 3"):
        opt.backward([scores.sum()] * 3, scores=scores, mode=mode)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", ["autograd", "one_backward"])
def test_a_weight_given_after_the_backward_pass_asks_for_its_gradient(mode):
    model = network()
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS)
    losses, scores = losses_of(model)
    opt.backward(losses, scores=scores, mode=mode)
    before = copy.deepcopy(model)
    opt.weights = {"a": 0.2, "none": 0.3, "b": 0.2, "c": 0.3}
    with pytest.raises(RuntimeError, match=r"objectives \['none'\] have had no backward pass"):
        opt.step()
    opt.weights = WEIGHTS
    opt.step()
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_overflow_of_the_others_is_one(bad):
    model = network()
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS)
    losses, _ = losses_of(model)
    opt.backward({**losses, "a": bad * losses["a"]})
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.solution.finite is False
    assert opt.solution.names == tuple(WEIGHTS)
