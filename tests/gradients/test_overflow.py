"""A direction that is not finite: GradScaler hears of it, and no optimizer steps along it."""

import weakref

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ClippedCAGradAdamW, ObjectiveGradients, combine, gram_first
from raco_fast.gradients.overflow import leave_overflow

WAYS = pytest.mark.parametrize("way", ["combine", "two passes", "keep dy", "not exact"])
WEIGHTS = {"a": 0.4, "b": 0.6}
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1),
    "adamw, fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
}


def network(*, exact: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    last = nn.Identity() if exact else nn.PReLU()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), last, nn.Flatten(0))
    raco_fast.prepare(model)
    return model


def losses_of(model: nn.Module, bad: float, t: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    scores = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(t)))
    return {"a": bad * scores.sum(), "b": (scores - 1).square().sum()}, scores


def direct(gradients: ObjectiveGradients, losses: dict[str, Tensor], scores: Tensor, way: str):
    """The common direction in p.grad, in one of the ways to get it."""
    if way == "combine":
        gradients.backward(losses)
        return combine(gradients, max_grad_norm=0.5)
    return gram_first(gradients, losses, scores, max_grad_norm=0.5, keep_dy=way == "keep dy")


@WAYS
@pytest.mark.filterwarnings("ignore:.*reaches the scores past")
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradscaler_skips_and_backs_off(name, unscale, way):
    model = network(exact=way != "not exact")
    optimizer = OPTIMIZERS[name](model.parameters())
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales, moved = [], []
    for bad in (torch.inf, 1.0, torch.nan, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        losses, scores = losses_of(model, bad)
        losses = {n: scaler.scale(loss) for n, loss in losses.items()}
        assert direct(gradients, losses, scores, way).finite is (bad == 1.0)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        pairs = zip(model.parameters(), before, strict=True)
        moved.append(any(not torch.equal(p, q) for p, q in pairs))
    assert scales == [512.0, 512.0, 256.0, 256.0]
    assert moved == [False, True, False, True]


@WAYS
@pytest.mark.filterwarnings("ignore:.*reaches the scores past")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_gradscaler_no_optimizer_steps_along_it(name, way):
    model = network(exact=way != "not exact")
    first, second = (OPTIMIZERS[name](part.parameters()) for part in (model[0], model[2:]))
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    for _ in range(2):
        losses, scores = losses_of(model, 1.0)
        assert direct(gradients, losses, scores, way).finite
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        losses, scores = losses_of(model, torch.inf)
        assert not direct(gradients, losses, scores, way).finite
        first.step()
        assert all(p.grad is None for p in model[0].parameters())
        second.step()
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_several_optimizers_share_a_scaler():
    model = network()
    optimizers = [torch.optim.SGD(model[0].parameters()), torch.optim.Adam(model[2].parameters())]
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses, _ = losses_of(model, torch.inf)
    gradients.backward({n: scaler.scale(loss) for n, loss in losses.items()})
    combine(gradients)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("way", ["two passes", "keep dy"])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_our_optimizer_counts_it_once(way, scale):
    model = network()
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, lr=0.1, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step, bad in enumerate((torch.inf, 1.0)):
        losses, scores = losses_of(model, bad)
        losses = {n: scaler.scale(loss) for n, loss in losses.items()}
        opt.backward(losses, scores=scores, mode="gram_first", keep_dy=way == "keep dy")
        scaler.step(opt)
        scaler.update()
        assert opt.skipped_steps == 1
        assert opt.solution.finite is (bad == 1.0)
        opt.zero_grad()
        assert len(opt.state) == 4 * step
    if scale is not None:
        assert scaler.get_scale() == scale / 2


@WAYS
@pytest.mark.filterwarnings("ignore:.*reaches the scores past")
@pytest.mark.parametrize("weights", [WEIGHTS, {"a": 1.0}])
def test_the_next_backward_pass_begins_without_it(weights, way):
    """Also where nobody steps or zeroes in between: `if not solution.finite: continue`."""
    found = []
    for overflow_first in (True, False):
        model = network(exact=way != "not exact")
        gradients = ObjectiveGradients(model.parameters(), weights)
        for bad in (torch.inf, torch.nan, 1.0) if overflow_first else (1.0,):
            losses, scores = losses_of(model, bad)
            losses = {name: losses[name] for name in weights}
            assert direct(gradients, losses, scores, way).finite is (bad == 1.0)
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_zeroed_since_are_not_taken_away(set_to_none):
    p = nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([p], lr=0.5)
    leave_overflow([p])
    sgd.zero_grad(set_to_none=set_to_none)
    p.sum().backward()
    sgd.step()
    assert p.tolist() == [0.5, 0.5]


def test_a_parameter_is_not_kept_alive():
    p = nn.Parameter(torch.ones(2))
    alive = weakref.ref(p)
    leave_overflow([p])
    del p
    assert alive() is None
