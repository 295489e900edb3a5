"""`ClippedCAGradAdamW` with several objectives, against AdamW fed with G0 computed another way."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from raco_fast.backends import choose
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.solver.dual import solve_dual

WEIGHTS = {"helpful": 0.5, "harmless": 0.2, "concise": 0.3}
ADAMW = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch(seed: int = 0, n: int = 8) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def losses_of(model: nn.Module, x: Tensor, *, agree: bool = False) -> dict[str, Tensor]:
    """Three losses in conflict, or three times the same one (then p = w and nothing is clipped)."""
    y = model(x.to(next(model.parameters()).dtype)).double()
    margin = y[:, 0] - y[:, 1]
    helpful = nn.functional.softplus(-margin).mean()
    if agree:
        return dict.fromkeys(WEIGHTS, helpful)
    return {
        "helpful": helpful,
        "harmless": nn.functional.softplus(margin + 0.3 * y[:, 2]).mean(),
        "concise": (y[:, 2] - x[:, 0]).square().mean(),
    }


def optimizer_of(model: nn.Module, **kwargs) -> ClippedCAGradAdamW:
    return ClippedCAGradAdamW(model.parameters(), **{**ADAMW, "weights": WEIGHTS, **kwargs})


def g0_in_float64(
    model: nn.Module, x: Tensor, c: float, rule: str, *, agree: bool = False
) -> tuple[list[Tensor], bool]:
    """G0 at the model's parameters, in float64 by autograd.grad and einsum; is clipping active?"""
    wide = copy.deepcopy(model).double()
    params = list(wide.parameters())
    losses = losses_of(wide, x, agree=agree).values()
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    G = torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])
    solution = solve_dual(G @ G.T, WEIGHTS, c, rule)
    flat = torch.einsum("i,in->n", solution.coefficients, G)
    parts = flat.split([p.numel() for p in params])
    return [part.view_as(p) for part, p in zip(parts, params, strict=True)], solution.clip_active


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("limit", [None, 0.2])
@pytest.mark.parametrize("rule", ["linear", "cagrad", "cagrad-clip", "mgda"])
def test_step_is_adamw_on_g0(rule, limit):
    ours, theirs = network(), network()
    opt = optimizer_of(ours, c=0.6, rule=rule, max_grad_norm=limit)
    plain = torch.optim.AdamW(theirs.parameters(), **ADAMW)
    clip_active = set()
    for t in range(12):
        agree = t % 4 == 3
        opt.backward(losses_of(ours, batch(t), agree=agree))
        opt.step()
        opt.zero_grad()
        g0, active = g0_in_float64(theirs, batch(t), 0.6, rule, agree=agree)
        clip_active.add(active)
        assert opt.solution.clip_active is active
        for p, g in zip(theirs.parameters(), g0, strict=True):
            p.grad = g.float()
        if limit is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert clip_active == ({True, False} if rule == "cagrad-clip" else {False})
    assert opt.skipped_steps == 0


def test_one_step_of_eight_and_eight_steps_of_one_are_the_same_update():
    ours, theirs = network(), network()
    one, eight = optimizer_of(ours, c=0.6), optimizer_of(theirs, c=0.6)
    for t in range(3):
        x = batch(t)
        one.backward(losses_of(ours, x))
        for row in x.split(1):
            eight.backward({n: loss / 8 for n, loss in losses_of(theirs, row).items()})
        for opt in (one, eight):
            opt.step()
            opt.zero_grad()
        torch.testing.assert_close(
            one.solution.coefficients, eight.solution.coefficients, rtol=1e-5, atol=1e-6
        )
    assert one.state[next(ours.parameters())]["step"].item() == 3.0
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_own_loop_and_backward_are_the_same_update():
    ours, theirs = network(), network()
    a, b = optimizer_of(ours), optimizer_of(theirs)
    a.backward(losses_of(ours, batch()))
    for name in reversed(WEIGHTS):
        with b.objective(name):
            losses_of(theirs, batch())[name].backward()
    a.step()
    b.step()
    assert equal(ours, theirs)


def test_solution_describes_the_step():
    model = network()
    opt = optimizer_of(model)
    assert opt.solution is None
    opt.backward(losses_of(model, batch()))
    opt.step()
    assert opt.objective_names == opt.solution.names == ("helpful", "harmless", "concise")
    assert opt.weights == WEIGHTS
    g0, _ = g0_in_float64(network(), batch(), 0.4, "cagrad-clip")
    norm = torch.cat([g.flatten() for g in g0]).norm().item()
    assert opt.solution.update_norm == pytest.approx(norm, rel=1e-5)


def test_step_leaves_the_gradients_alone_and_zero_grad_clears_them():
    model = network()
    opt = optimizer_of(model)
    opt.backward(losses_of(model, batch()))
    weight = model[0].weight
    before = {n: g.clone() for n, g in opt.gradients.of(weight).items()}
    opt.step()
    for name, grad in opt.gradients.of(weight).items():
        assert torch.equal(grad, before[name])
    opt.step()  # the same gradients again, as with AdamW
    assert opt.state[weight]["step"].item() == 2.0
    opt.zero_grad(set_to_none=False)
    assert not any(g.any() for g in opt.gradients.of(weight).values())
    opt.zero_grad()
    assert weight.grad is None


def test_groups_have_their_own_hyperparameters_and_one_common_gram():
    ours, theirs = network(), network()
    groups = [{"lr": 0.05, "weight_decay": 0.3}, {"betas": (0.5, 0.9), "eps": 1e-3}]

    def split(model: nn.Sequential) -> list[dict]:
        return [
            {"params": model[0].parameters(), **groups[0]},
            {"params": model[2].parameters(), **groups[1]},
        ]

    opt = ClippedCAGradAdamW(split(ours), **ADAMW, weights=WEIGHTS, c=0.6)
    plain = torch.optim.AdamW(split(theirs), **ADAMW)
    for t in range(4):
        opt.backward(losses_of(ours, batch(t)))
        opt.step()
        opt.zero_grad()
        g0, _ = g0_in_float64(theirs, batch(t), 0.6, "cagrad-clip")
        for p, g in zip(theirs.parameters(), g0, strict=True):
            p.grad = g.float()
        plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_mixed_dtypes_in_one_model():
    model = network()
    model[0].bfloat16()

    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model[2](model[0](x.bfloat16()).tanh().float())

    opt = ClippedCAGradAdamW(model.parameters(), **ADAMW, weights=WEIGHTS)
    y = Cast()(batch())
    opt.backward(
        {"helpful": y[:, 0].mean(), "harmless": y.square().mean(), "concise": y[:, 2].mean()}
    )
    rows = [
        torch.cat([g.double().flatten() for g in one]) for one in opt.gradients.collect()[0].grads
    ]
    G = torch.stack(rows)
    opt.step()
    torch.testing.assert_close(opt.solution.gram, G @ G.T, rtol=1e-6, atol=1e-7)
    assert opt.state[model[0].weight]["exp_avg"].dtype == torch.bfloat16
    assert opt.state[model[2].weight]["exp_avg"].dtype == torch.float32


def test_unused_parameters_keep_value_and_state():
    model, spare, rare = network(), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    opt = ClippedCAGradAdamW([*model.parameters(), spare, rare], **ADAMW, weights=WEIGHTS)
    losses = losses_of(model, batch())
    opt.backward({**losses, "concise": losses["concise"] + rare.prod()})
    opt.step()
    assert spare.tolist() == [1.0] * 3  # no weight decay either
    assert spare not in opt.state
    assert opt.state[rare]["step"].item() == 1.0
    alpha = opt.solution.coefficients[2].item()
    torch.testing.assert_close(opt.state[rare]["exp_avg"], torch.full((2,), 0.2 * alpha))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_skips_the_step(bad):
    model = network()
    opt = optimizer_of(model)
    opt.backward(losses_of(model, batch()))
    opt.step()
    opt.zero_grad()
    before, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict()["state"])
    losses = losses_of(model, batch(1))
    opt.backward({**losses, "harmless": losses["harmless"] * bad})
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.solution.finite is False
    assert equal(model, before)
    after = opt.state_dict()["state"]
    assert all(torch.equal(after[k][n], state[k][n]) for k in state for n in state[k])
    opt.zero_grad()
    opt.backward(losses_of(model, batch(1)))
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.solution.finite is True
    assert not equal(model, before)


def test_a_non_finite_first_step_makes_no_state():
    model = network()
    opt = optimizer_of(model)
    opt.backward({n: loss * float("nan") for n, loss in losses_of(model, batch()).items()})
    opt.step()
    assert opt.skipped_steps == 1
    assert len(opt.state) == 0


def scaled_run(scaler: torch.amp.GradScaler, unscale: bool, bad_step: int | None) -> tuple:
    model = network()
    opt = optimizer_of(model, c=0.6, max_grad_norm=0.5)
    scales = []
    for t in range(4):
        losses = losses_of(model, batch(t))
        factor = float("inf") if t == bad_step else 1.0
        losses["concise"] = losses["concise"] * factor
        opt.backward({n: scaler.scale(loss) for n, loss in losses.items()})
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
    return model, opt, scales


@pytest.mark.parametrize("unscale", [False, True])
def test_gradscaler_changes_nothing_when_all_is_finite(unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=2)
    model, opt, scales = scaled_run(scaler, unscale, None)
    plain, expected, _ = scaled_run(torch.amp.GradScaler("cpu", enabled=False), False, None)
    assert scales == [4096.0, 8192.0, 8192.0, 16384.0]
    assert opt.skipped_steps == 0
    torch.testing.assert_close(opt.solution.gram, expected.solution.gram, rtol=1e-6, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert not hasattr(opt, "grad_scale")


@pytest.mark.parametrize("unscale", [False, True])
def test_gradscaler_backs_off_when_one_objective_overflows(unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    model, opt, scales = scaled_run(scaler, unscale, bad_step=1)
    assert scales == [4096.0, 2048.0, 2048.0, 2048.0]
    assert opt.skipped_steps == 1
    assert opt.state[next(model.parameters())]["step"].item() == 3.0
    assert all(p.isfinite().all() for p in model.parameters())


def test_found_inf_alone_skips_the_step():
    model = network()
    opt = optimizer_of(model)
    opt.backward(losses_of(model, batch()))
    opt.found_inf = torch.ones(())
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.solution.finite is False
    assert equal(model, network())


def test_closure_reevaluates_every_objective():
    model = network()
    opt = optimizer_of(model)

    def closure() -> dict[str, float]:
        opt.zero_grad()
        losses = losses_of(model, batch())
        opt.backward(losses)
        return {n: loss.item() for n, loss in losses.items()}

    with torch.no_grad():
        values = [opt.step(closure) for _ in range(40)]
    assert list(values[0]) == list(WEIGHTS)
    assert values[-1]["concise"] < values[0]["concise"]
    assert opt.state[model[0].weight]["step"].item() == 40.0


def test_wrong_use_names_the_cure():
    model = network()
    opt = optimizer_of(model)
    with pytest.raises(RuntimeError, match=r"step without backward: .* call backward\(losses\)"):
        opt.step()
    losses = losses_of(model, batch())
    with pytest.raises(ValueError, match=r"`losses` must have .* missing \['concise'\]"):
        opt.backward({n: losses[n] for n in ("helpful", "harmless")})
    with opt.objective("helpful"):
        losses["helpful"].backward()
    with pytest.raises(RuntimeError, match=r"\['harmless', 'concise'\] have had no backward pass"):
        opt.step()
    opt.zero_grad()
    sum(losses_of(model, batch()).values()).backward()
    with pytest.raises(RuntimeError, match=r"filled outside of an objective.*with objective"):
        opt.step()
    assert len(opt.state) == 0
    assert equal(model, network())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": {"a": 0.5, "b": 0.4}}, "`weights` must sum to 1, got 0.9"),
        ({"weights": {"a": 1.5, "b": -0.5}}, "`weights` must not be negative"),
        ({"weights": []}, "`weights` must hold 1 to 32 objectives"),
        ({"c": -0.1}, r"`c` must be in \[0, 1\), got -0.1"),
        ({"rule": "pcgrab"}, "`rule` must be one of .* .*'pcgrab'"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` must be a positive number, got 0.0; None"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(network(), **kwargs)


def test_sparse_gradients_are_refused():
    for weights in ([1.0], [0.5, 0.5]):
        table = nn.Embedding(5, 2, sparse=True)
        opt = ClippedCAGradAdamW(table.parameters(), weights=weights)
        losses = [table(torch.tensor([1, 3])).sum()] * len(weights)

        def use(opt=opt, losses=losses) -> None:
            opt.backward(losses)
            opt.step()

        with pytest.raises(TypeError, match=r"dense tensor, got sparse_coo; .*sparse=False"):
            use()


def train(model: nn.Module, opt: ClippedCAGradAdamW, steps: range) -> None:
    for t in steps:
        opt.zero_grad()
        opt.backward(losses_of(model, batch(t)))
        opt.step()


def test_state_dict_continues_to_the_last_bit():
    whole = network()
    train(whole, optimizer_of(whole, c=0.6, max_grad_norm=0.5, amsgrad=True), range(8))
    model = network()
    first = optimizer_of(model, c=0.6, max_grad_norm=0.5, amsgrad=True)
    train(model, first, range(4))
    first.skipped_steps = 3
    saved = pickle.loads(pickle.dumps(first.state_dict()))
    second = optimizer_of(model, lr=0.7, c=0.1, weights={**WEIGHTS, "helpful": 0.2, "concise": 0.6})
    second.load_state_dict(saved)
    assert (second.weights, second.c, second.max_grad_norm) == (WEIGHTS, 0.6, 0.5)
    assert second.skipped_steps == 3
    train(model, second, range(4, 8))
    assert equal(model, whole)


def test_state_dict_of_other_objectives_is_refused():
    first, second = network(), network()
    saved = optimizer_of(first).state_dict()
    other = ClippedCAGradAdamW(second.parameters(), weights={"x": 0.5, "y": 0.5}, c=0.2)
    with pytest.raises(ValueError, match=r"objectives \('helpful', .* this one has \('x', 'y'\)"):
        other.load_state_dict(saved)
    del saved["raco"], saved["param_groups"][0]["raco"]
    other.load_state_dict(saved)
    assert (other.weights, other.c) == ({"x": 0.5, "y": 0.5}, 0.2)
    assert other.param_groups[0]["lr"] == ADAMW["lr"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_continue_alike_and_begin_without_gradients(copied):
    model = network()
    opt = optimizer_of(model, c=0.6, max_grad_norm=0.5, rule="cagrad")
    train(model, opt, range(3))
    opt.zero_grad()
    opt.backward(losses_of(model, batch(3)))  # in the middle of an accumulation
    other_model, other = copied((model, opt))
    assert repr(other) == repr(opt)
    assert other.solution.names == opt.solution.names
    assert other.gradients.parameters()[0] is next(other_model.parameters())
    with pytest.raises(RuntimeError, match="step without backward"):
        other.step()  # as torch's copies, this one has no gradients
    other.backward(losses_of(other_model, batch(3)))
    for o in (opt, other):
        o.step()
    assert equal(model, other_model)
    train(other_model, other, range(4, 6))
    assert not equal(model, other_model)


def test_torch_distributed_checkpoint_loads_into_a_fresh_optimizer():
    whole, model, fresh = network(), network(), network(seed=1)
    train(whole, optimizer_of(whole), range(5))
    opt = optimizer_of(model)
    train(model, opt, range(3))
    fresh_opt = optimizer_of(fresh)
    state = get_optimizer_state_dict(model, opt)
    fresh.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fresh, fresh_opt, state)
    train(fresh, fresh_opt, range(3, 5))
    assert equal(fresh, whole)


def test_added_group_and_swapped_parameters_are_seen():
    model, extra = network(), nn.Parameter(torch.ones(2))
    opt = optimizer_of(model)
    opt.add_param_group({"params": [extra], "lr": 0.5})
    losses = losses_of(model, batch())
    opt.backward({**losses, "helpful": losses["helpful"] + extra.sum()})
    opt.step()
    opt.zero_grad()
    assert not torch.equal(extra, torch.ones(2))
    swapped = nn.Parameter(torch.ones(2))
    opt.param_groups[1]["params"][0] = swapped
    losses = losses_of(model, batch())
    opt.backward({**losses, "helpful": losses["helpful"] + swapped.sum()})
    opt.step()
    assert not torch.equal(swapped, torch.ones(2))


def test_it_is_a_torch_optimizer_and_says_what_it_does():
    opt = optimizer_of(network(), max_grad_norm=0.5)
    assert isinstance(opt, torch.optim.Optimizer)
    for part in ("Parameter Group 0", "lr: 0.02", "weights: {'helpful': 0.5", "c: 0.4"):
        assert part in repr(opt)
    assert "backend: cpu\n" in repr(opt)
    with choose.backend("reference"):
        assert "backend: reference\n" in repr(opt)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "amsgrad": True})
    assert "backend: cpu, reference\n" in repr(opt)
