"""`combine`: G0 in p.grad, and any torch optimizer steps along it."""

import pytest
import torch
from torch import Tensor, nn

from raco_fast.gradients.norm_clip import clip_factor
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.optim.combine import combine
from raco_fast.solver.dual import solve_dual

WEIGHTS = {"a": 0.2, "b": 0.5, "c": 0.3}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 3), (5,), (2,)]
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def losses_of(params: list[nn.Parameter], shift: float) -> dict[str, Tensor]:
    matrix, vector, rare = params
    y = (matrix + vector[:, None] + shift).tanh()
    return {"a": (y[0] - y[1]).sum(), "b": -y[0].sum() + y[2].square().sum(), "c": rare.cos().sum()}


def direction(params: list[nn.Parameter], shift: float, c: float, rule: str) -> list[Tensor]:
    """G0 by another way: float64 copies of the parameters, autograd.grad and einsum."""
    wide = [nn.Parameter(p.detach().double()) for p in params]
    grads = [
        torch.autograd.grad(loss, wide, retain_graph=True, materialize_grads=True)
        for loss in losses_of(wide, shift).values()
    ]
    G = torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])
    alpha = torch.as_tensor(solve_dual(G @ G.T, WEIGHTS, c, rule).coefficients)
    flat = torch.einsum("i,in->n", alpha, G)
    return [
        part.view_as(p)
        for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)
    ]


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.02),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.02, betas=(0.8, 0.95), eps=1e-4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["linear", "cagrad", "cagrad-clip", "mgda"])
def test_any_optimizer_steps_along_g0(name, rule):
    ours, theirs = parameters(), parameters()
    gradients = ObjectiveGradients(ours, WEIGHTS)
    optimizer, plain = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    for t in range(6):
        gradients.backward(losses_of(ours, 0.1 * t))
        solution = combine(gradients, c=0.5, rule=rule)
        assert solution.names == tuple(WEIGHTS)
        optimizer.step()
        optimizer.zero_grad()
        for p, g in zip(theirs, direction(theirs, 0.1 * t, 0.5, rule), strict=True):
            p.grad = g.float()
        plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        assert not torch.equal(p, parameters()[0]) or p.shape != (5, 3)


@pytest.mark.parametrize(("limit", "clips"), [(0.3, True), (1e3, False)])
def test_max_grad_norm_is_clip_grad_norm(limit, clips):
    params = parameters()
    gradients = ObjectiveGradients(params, WEIGHTS)
    gradients.backward(losses_of(params, 0.2))
    solution = combine(gradients, max_grad_norm=limit)
    expected = direction(params, 0.2, 0.4, "cagrad-clip")
    for q, g in zip(plain := parameters(), expected, strict=True):
        q.grad = g.float()
    norm = nn.utils.clip_grad_norm_(plain, limit)
    assert bool(norm > limit) is clips
    assert solution.update_norm == pytest.approx(float(norm), rel=1e-6)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_clip_factor_is_torchs():
    assert clip_factor(3.0, None) == 1.0
    assert clip_factor(3.0, 6.0) == 1.0
    assert clip_factor(3.0, 1.5) == 1.5 / (3.0 + 1e-6)
    assert clip_factor(0.0, 1.5) == 1.0


def test_g0_takes_the_place_of_the_objectives_gradients():
    params = parameters()
    gradients = ObjectiveGradients(params, WEIGHTS)
    gradients.backward(losses_of(params, 0.0))
    pointer = gradients.of(params[0])["a"].data_ptr()
    combine(gradients)
    assert type(params[0].grad) is Tensor
    assert params[0].grad.data_ptr() == pointer  # no further copy of the gradients
    with pytest.raises(RuntimeError, match="filled outside of an objective"):
        gradients.backward(losses_of(params, 0.0))
    gradients.zero()
    with pytest.raises(RuntimeError, match="step without backward"):
        combine(gradients)


def test_zeros_left_by_another_optimizer_are_no_obstacle():
    params = parameters()
    gradients = ObjectiveGradients(params, WEIGHTS)
    optimizer = torch.optim.SGD(params, lr=0.0)
    solutions = []
    for _ in range(2):
        gradients.backward(losses_of(params, 0.0))
        solutions.append(combine(gradients))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert torch.equal(solutions[0].gram, solutions[1].gram)


def test_untouched_parameters_are_left_alone():
    params = [*parameters(), nn.Parameter(torch.ones(4))]
    gradients = ObjectiveGradients(params, WEIGHTS)
    gradients.backward(losses_of(params[:3], 0.0))
    combine(gradients)
    assert params[3].grad is None
    torch.optim.SGD(params, lr=0.1, weight_decay=0.5).step()
    assert params[3].tolist() == [1.0] * 4


def test_one_objective_is_its_own_gradient_scaled():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    gradients = ObjectiveGradients([p], {"only": 1.0})
    (p.square().sum() / 2).backward()
    combine(gradients, c=0.0)
    assert p.grad.tolist() == [3.0, 4.0]
    solution = combine(gradients, c=0.25)
    assert solution.update_norm == pytest.approx(6.25)
    torch.testing.assert_close(p.grad, torch.tensor([3.75, 5.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_are_seen_and_leave_nothing_to_step_along(bad):
    params = parameters()
    before = [p.detach().clone() for p in params]
    gradients = ObjectiveGradients(params, WEIGHTS)
    losses = losses_of(params, 0.0)
    gradients.backward({**losses, "c": losses["c"] * bad})
    solution = combine(gradients)
    assert solution.finite is False
    assert all(p.grad.isnan().all() for p in params)
    torch.optim.AdamW(params, lr=0.1, weight_decay=0.1).step()
    assert all(p.grad is None for p in params)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_gradscaler_unscales_every_objective():
    ours, theirs = parameters(), parameters()
    gradients, plain = (ObjectiveGradients(ps, WEIGHTS) for ps in (ours, theirs))
    optimizer = torch.optim.SGD(ours, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients.backward({n: scaler.scale(loss) for n, loss in losses_of(ours, 0.0).items()})
    scaler.unscale_(optimizer)
    combine(gradients, max_grad_norm=0.3)
    scaler.step(optimizer)
    scaler.update()
    plain.backward(losses_of(theirs, 0.0))
    combine(plain, max_grad_norm=0.3)
    torch.optim.SGD(theirs, lr=0.1).step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_half_precision_gradients_are_combined_in_float32():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    gradients = ObjectiveGradients([p], {"a": 0.5, "b": 0.5})
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    gradients.backward({"a": (p * a).sum(), "b": (p * a.flip(0)).sum()})
    solution = combine(gradients, c=0.3)
    G = torch.stack([a, a.flip(0)]).float()
    expected = (torch.as_tensor(solution.coefficients).float() @ G).bfloat16()
    assert p.grad.dtype == torch.bfloat16
    assert torch.equal(p.grad, expected)


def test_wrong_arguments():
    params = parameters()
    gradients = ObjectiveGradients(params, WEIGHTS)
    gradients.backward(losses_of(params, 0.0))
    with pytest.raises(ValueError, match="`c` must be in "):
        combine(gradients, c=1.0)
    with pytest.raises(ValueError, match="`rule` must be one of"):
        combine(gradients, rule="nosh")
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`max_grad_norm` must be a positive number, got"):
            combine(gradients, max_grad_norm=limit)
    combine(gradients)  # none of the mistakes used the gradients up
