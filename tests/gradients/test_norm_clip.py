"""Clipping by the true norm, whoever unscales the gradients and when."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ObjectiveGradients, combine, gram_first
from raco_fast.gradients.norm_clip import ClippedGrad, clip_factor, plain

WEIGHTS = {"a": 0.4, "b": 0.6}
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.02, foreach=False),
    "sgd, foreach": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, foreach=True),
    "sgd, fused": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "adam, foreach": lambda ps: torch.optim.Adam(ps, lr=0.1, eps=0.01, foreach=True),
    "adam, fused": lambda ps: torch.optim.Adam(ps, lr=0.1, eps=0.01, fused=True),
    "adamw, fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, eps=0.01, fused=True),
    "adagrad, fused": lambda ps: torch.optim.Adagrad(ps, lr=0.1, eps=0.01, fused=True),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))
    raco_fast.prepare(model)
    return model


def losses_of(model: nn.Module, t: int) -> tuple[dict[str, Tensor], Tensor]:
    scores = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(t)))
    return {"a": scores.sum(), "b": (scores - 1).square().sum()}, scores


def trained(
    optimizer_of, scaler: torch.amp.GradScaler, *, way: str, unscale: str = "by step", limit=0.3
) -> list[Tensor]:
    """The parameters after some steps along directions of norm 0.3, or unclipped ones."""
    model = network()
    optimizer = optimizer_of(model.parameters())
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    for t in range(4):
        losses, scores = losses_of(model, t)
        losses = {name: scaler.scale(loss) for name, loss in losses.items()}
        if way == "combine":
            gradients.backward(losses)
            if unscale == "before":
                scaler.unscale_(optimizer)
            combine(gradients, max_grad_norm=limit)
        else:
            keep = way == "keep dy"
            gram_first(gradients, losses, scores, max_grad_norm=limit, keep_dy=keep)
        if unscale == "after":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=t % 2 == 0 or way != "combine")
    assert scaler.get_scale() == (65536.0 if scaler.is_enabled() else 1.0)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("way", "unscale"),
    [(way, when) for way in ("combine", "two passes", "keep dy") for when in ("by step", "after")]
    + [("combine", "before")],
)
def test_gradscaler_changes_no_clipped_step(name, way, unscale):
    optimizer_of = OPTIMIZERS[name]
    plainly = trained(optimizer_of, torch.amp.GradScaler("cpu", enabled=False), way=way)
    scaled = trained(optimizer_of, torch.amp.GradScaler("cpu"), way=way, unscale=unscale)
    torch.testing.assert_close(scaled, plainly, rtol=1e-5, atol=1e-6)
    unclipped = trained(
        optimizer_of, torch.amp.GradScaler("cpu"), way=way, unscale=unscale, limit=None
    )
    assert not torch.allclose(scaled[0], unclipped[0], rtol=1e-2)


def nash_step(optimizer_of, scaler: torch.amp.GradScaler, way: str, unscale: str) -> list[Tensor]:
    """The parameters after a step of a rule whose coefficients change with the scale."""
    model = network()
    optimizer = optimizer_of(model.parameters())
    ours = isinstance(optimizer, raco_fast.ClippedCAGradAdamW)
    gradients = optimizer if ours else ObjectiveGradients(model.parameters(), WEIGHTS)
    losses, scores = losses_of(model, 0)
    losses = {name: scaler.scale(loss) for name, loss in losses.items()}
    if way == "blocks":
        for name, loss in losses.items():
            with gradients.objective(name):
                loss.backward(retain_graph=True)
    elif ours:
        gradients.backward(losses, scores=scores, mode=way)
    elif way == "gram_first":
        gram_first(gradients, losses, scores, rule="nash")
    else:
        gradients.backward(losses, scores=scores, mode=way)
    if unscale == "before":
        scaler.unscale_(optimizer)
    if not ours and way != "gram_first":
        combine(gradients, rule="nash")
    if unscale == "after":
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    return [p.detach() for p in model.parameters()]


def our_nash(params):
    return raco_fast.ClippedCAGradAdamW(params, lr=0.1, eps=0.01, weights=WEIGHTS, rule="nash")


NASH = OPTIMIZERS | {"ours": our_nash}
# Ours solves when it steps, by then unscaled, but for mode "gram_first".
TOO_LATE = [
    (name, way, unscale)
    for name in NASH
    for way in ("autograd", "one_backward", "blocks", "gram_first")
    for unscale in ("after", "by step")
    if name != "ours" or way == "gram_first"
]


@pytest.mark.parametrize(("name", "way", "unscale"), TOO_LATE)
def test_a_rule_that_minds_the_scale_refuses_to_be_unscaled(name, way, unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    message = r"rule nash was found from gradients times 3, .* Call scaler.unscale_\(optimizer\)"
    with pytest.raises(RuntimeError, match=message):
        nash_step(NASH[name], scaler, way, unscale)


@pytest.mark.parametrize("way", ["autograd", "one_backward", "blocks"])
@pytest.mark.parametrize("name", NASH)
def test_a_rule_that_minds_the_scale_takes_unscaled_gradients(name, way):
    plainly = nash_step(NASH[name], torch.amp.GradScaler("cpu", enabled=False), way, "by step")
    for unscale in ("before", "by step") if name == "ours" else ("before",):
        scaled = nash_step(NASH[name], torch.amp.GradScaler("cpu"), way, unscale)
        torch.testing.assert_close(scaled, plainly, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [0.1, 0.6])
def test_unscaling_in_parts_clips_once_by_the_true_norm(norm):
    direction = torch.tensor([0.6, 0.8]).mul(norm)
    for steps in ([0.25], [0.5, 0.5], [1.0, 0.25], [0.125, 2.0]):
        scaled = direction * 4
        grad = ClippedGrad.of(scaled * clip_factor(4 * norm, 0.3), 4 * norm, 0.3)
        for step in steps:
            torch._amp_foreach_non_finite_check_and_unscale_(
                [grad, torch.ones(2)], torch.zeros(()), torch.tensor(step)
            )
        torch.testing.assert_close(plain(grad), direction * clip_factor(norm, 0.3))


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda g: g.zero_(),
        lambda g: torch._foreach_zero_([g]),
        lambda g: g.fill_(0.0),
        lambda g: g.copy_(torch.zeros(2)),
        lambda g: torch._foreach_copy_([g], [torch.zeros(2)]),
    ],
    ids=["zero_", "foreach zero_", "fill_", "copy_", "foreach copy_"],
)
def test_an_overwritten_gradient_is_clipped_no_more(overwrite):
    grad = ClippedGrad.of(torch.ones(2), 1024.0, 1.0, "nash")
    overwrite(grad)
    grad += 8.0
    torch._amp_foreach_non_finite_check_and_unscale_([grad], torch.zeros(()), torch.tensor(0.5))
    assert grad.tolist() == [4.0, 4.0]


def test_it_is_an_ordinary_tensor_otherwise():
    model, limit = network(), 0.3
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    gradients.backward(losses_of(model, 0)[0])
    combine(gradients, max_grad_norm=limit)
    grad = model[0].weight.grad
    assert type(grad) is ClippedGrad
    assert type(grad + 1) is type(grad.clone()) is type(plain(grad)) is Tensor
    assert plain(grad).data_ptr() == grad.data_ptr()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.15) == pytest.approx(limit, rel=1e-5)
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]) == pytest.approx(
        0.15, rel=1e-5
    )
    for twin in (copy.deepcopy(grad), pickle.loads(pickle.dumps(grad))):
        assert torch.equal(twin, grad)
        assert twin.data_ptr() != grad.data_ptr()
    twin = copy.deepcopy(ClippedGrad.of(torch.ones(2), 8.0, 4.0))
    torch._amp_foreach_non_finite_check_and_unscale_([twin], torch.zeros(()), torch.tensor(0.25))
    torch.testing.assert_close(plain(twin), torch.full((2,), 0.5))  # of norm 2, not clipped
    model.double()
    assert model[0].weight.grad.dtype == torch.float64
    gradients.zero(set_to_none=False)
    gradients.backward(losses_of(model.float(), 0)[0])  # zeros belong to any objective
    gradients.collect()
