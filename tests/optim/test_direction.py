"""What mode "gram_first" leaves for the step: when it counts still, and when it must stay."""

import copy

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"a": 0.3, "b": 0.7}
MODES = pytest.mark.parametrize("mode", ["autograd", "one_backward", "objective", "gram_first"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))
    raco_fast.prepare(model)
    return model


def optimizer_of(model: nn.Module, weights=WEIGHTS) -> ClippedCAGradAdamW:
    return ClippedCAGradAdamW(model.parameters(), lr=0.1, eps=0.01, c=0.6, weights=weights)


def losses_of(model: nn.Module, t: int, names=WEIGHTS) -> tuple[dict[str, Tensor], Tensor]:
    scores = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(t)))
    losses = {"a": scores.sum(), "b": (scores - 1).square().sum()}
    return {name: losses[name] for name in names}, scores


def backward(opt: ClippedCAGradAdamW, model: nn.Module, t: int, mode: str, **options) -> None:
    losses, scores = losses_of(model, t, opt.objective_names)
    if mode == "objective":
        for name, loss in losses.items():
            with opt.objective(name):
                loss.backward(retain_graph=True)
    elif mode == "plain":
        losses["a"].backward()
    else:
        opt.backward(losses, scores=scores, mode=mode, **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


CLEAR = {
    "model.zero_grad": lambda model, opt: model.zero_grad(),
    "p.grad = None": lambda model, opt: [setattr(p, "grad", None) for p in model.parameters()],
    "gradients.zero": lambda model, opt: opt.gradients.zero(),
    "opt.zero_grad": lambda model, opt: opt.zero_grad(),
    "zeros, opt.zero_grad": lambda model, opt: opt.zero_grad(set_to_none=False),
    "zeros, model.zero_grad": lambda model, opt: model.zero_grad(set_to_none=False),
}


# A plain backward pass adds to zeros behind our back.
CLEARED = [
    (mode, weights, clear)
    for clear in CLEAR
    for weights, last in ((WEIGHTS, "gram_first"), ({"a": 1.0}, "plain"))
    for mode in ("autograd", "one_backward", "objective", last)
    if "zeros" not in clear or mode != "plain"
]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(("mode", "weights", "clear"), CLEARED)
def test_cleared_gradients_are_forgotten(mode, weights, clear, stepped):
    found = []
    for first in (True, False):
        model = network()
        opt = optimizer_of(model, weights)
        if stepped:
            backward(opt, model, 0, "gram_first")
            opt.step()
        if first:
            if stepped:
                opt.zero_grad()
            before = copy.deepcopy(opt.state_dict())
            backward(opt, model, 7, "gram_first")
            CLEAR[clear](model, opt)
            for k, state in opt.state_dict()["state"].items():
                assert torch.equal(state["exp_avg"], before["state"][k]["exp_avg"])
        else:
            opt.zero_grad()
        backward(opt, model, 1, mode)
        opt.step()
        assert not opt.solution.gram.isnan().any()
        found.append((model, opt.solution.gram))
    assert equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("stepped", [False, True])
@MODES
def test_nothing_is_added_to_a_direction(mode, stepped):
    model, twin = network(), network()
    opt, twin_opt = optimizer_of(model), optimizer_of(twin)
    for o, m in ((opt, model), (twin_opt, twin)):
        backward(o, m, 0, "gram_first")
        if stepped:
            o.step()
    message = "cannot add to gradients" if mode == "gram_first" else "p.grad holds the common dir.*"
    with pytest.raises(RuntimeError, match=rf"{message}.*zero_grad\(\) first"):
        backward(opt, model, 1, mode)
    for o in (opt, twin_opt):
        o.step()
    assert equal(model, twin)  # the refused call lost nothing
    assert not equal(model, network())


@pytest.mark.parametrize("mode", ["autograd", "one_backward"])
def test_a_direction_for_another_optimizer_is_not_added_to_either(mode):
    model, twin = network(), network()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    twins = ObjectiveGradients(twin.parameters(), WEIGHTS)
    losses, scores = losses_of(model, 0)
    raco_fast.gram_first(gradients, losses, scores)
    losses, scores = losses_of(model, 1)
    with pytest.raises(RuntimeError, match=r"filled .* the direction of combine or gram_first"):
        gradients.backward(losses, scores=scores, mode=mode)
    model.zero_grad()
    gradients.backward(losses, scores=scores, mode=mode)  # their graph was not used up
    losses, scores = losses_of(twin, 1)
    twins.backward(losses, scores=scores, mode=mode)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert all(map(torch.equal, gradients.of(p).values(), twins.of(q).values()))


@MODES
def test_another_backward_after_an_overflow(mode):
    model, twin = network(), network()
    opt, twin_opt = optimizer_of(model), optimizer_of(twin)
    losses, scores = losses_of(model, 0)
    opt.backward([losses["a"] * torch.inf, losses["b"]], scores=scores, mode="gram_first")
    model.zero_grad()
    for o, m in ((opt, model), (twin_opt, twin)):
        backward(o, m, 1, mode)
        o.step()
    assert opt.skipped_steps == 0
    assert equal(model, twin)


@MODES
def test_another_backward_after_the_step_in_backward(mode):
    model, twin = network(), network()
    opt, twin_opt = optimizer_of(model), optimizer_of(twin)
    for o, m in ((opt, model), (twin_opt, twin)):
        backward(o, m, 0, "gram_first", step_in_backward=True)
        if o is twin_opt:
            o.step()
            o.zero_grad()
        backward(o, m, 1, mode)
        o.step()
    assert equal(model, twin)
    assert opt.state[model[0].weight]["step"] == 2.0


def test_a_step_without_gradients_is_noticed():
    model = network()
    opt = optimizer_of(model)
    for options in ({}, {"step_in_backward": True}):
        backward(opt, model, 0, "gram_first", **options)
        if options:
            opt.step()
        model.zero_grad()
        with pytest.raises(RuntimeError, match="step without backward"):
            opt.step()


SCALED = {
    "each": lambda scaler, losses: {n: scaler.scale(loss) for n, loss in losses.items()},
    "a list": lambda scaler, losses: scaler.scale(list(losses.values())),
    "one is a constant": lambda scaler, losses: [scaler.scale(losses["a"]), torch.tensor(0.5)],
    "then averaged": lambda scaler, losses: [scaler.scale(loss) / 3 for loss in losses.values()],
    "then weighed": lambda scaler, losses: [0.7 * scaler.scale(x) for x in losses.values()],
}


@pytest.mark.parametrize("scale", [2.0, 65536.0])
@pytest.mark.parametrize("keep_dy", [False, True])
@pytest.mark.parametrize("how", SCALED)
def test_scaled_losses_are_refused_before_a_step_in_backward(how, keep_dy, scale):
    model = network()
    opt = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    losses, scores = losses_of(model, 0)
    with pytest.raises(RuntimeError, match=rf"`losses` are multiplied by {scale:g}, as GradScaler"):
        opt.backward(
            SCALED[how](scaler, losses),
            scores=scores,
            mode="gram_first",
            keep_dy=keep_dy,
            step_in_backward=True,
        )
    assert equal(model, network())
    assert len(opt.state) == 0
    opt.backward(losses, scores=scores, mode="gram_first", keep_dy=keep_dy, step_in_backward=True)
    assert not equal(model, network())


@pytest.mark.parametrize("bad", [1.0, torch.inf])
def test_a_scaler_that_was_not_recognised_is_told_after_the_step_in_backward(bad):
    model = network()
    opt = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    losses, scores = losses_of(model, 0)
    losses = {name: scaler.scale(loss) * bad for name, loss in losses.items()}
    opt.backward(losses, scores=scores, mode="gram_first", step_in_backward=True)
    done = "has updated them already, along" if bad == 1.0 else "found an overflow in"
    with pytest.raises(RuntimeError, match=f"{done} gradients times 3; leave out the GradScaler"):
        scaler.step(opt)
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")


def test_a_step_that_is_refused_forgets_the_scale():
    """GradScaler would multiply the next step's scale by what it finds in the optimizer."""
    model, twin = network(), network()
    opt, twin_opt = optimizer_of(model), optimizer_of(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses, _ = losses_of(model, 0)
    with opt.objective("a"):
        scaler.scale(losses["a"]).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"\['b'\] have had no backward pass"):
        scaler.step(opt)
    with opt.objective("b"):
        scaler.scale(losses["b"]).backward()
    scaler.step(opt)
    backward(twin_opt, twin, 0, "objective")
    twin_opt.step()
    torch.testing.assert_close(opt.solution.gram, twin_opt.solution.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_dy", [False, True])
def test_a_step_in_backward_reads_the_groups_once(keep_dy):
    """A search for each parameter would cost the square of their number."""

    class Counted(list):
        reads = 0

        def __iter__(self):
            Counted.reads += 1
            return super().__iter__()

    reads = []
    for layers in (2, 12):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)], nn.Linear(4, 1))
        model.append(nn.Flatten(0))
        raco_fast.prepare(model)
        opt = optimizer_of(model)
        opt.param_groups[0]["params"] = Counted(opt.param_groups[0]["params"])
        for t in range(2):
            Counted.reads = 0
            backward(opt, model, t, "gram_first", keep_dy=keep_dy, step_in_backward=True)
        reads.append(Counted.reads)
        assert len(opt.state) == 2 * (layers + 1)
    assert reads[0] == reads[1]


def test_losses_may_be_multiplied_by_numbers_before_a_step_in_backward():
    factors = [2.0, 65536.0, torch.tensor(0.5), torch.tensor(3.0), torch.tensor(4.0).double()]
    for factor in factors:
        model = network()
        opt = optimizer_of(model)
        losses, scores = losses_of(model, 0)
        losses = {name: loss * factor / 2 for name, loss in losses.items()}
        opt.backward(losses, scores=scores, mode="gram_first", step_in_backward=True)
        assert not equal(model, network())
