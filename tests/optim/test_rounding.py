"""`ClippedCAGradAdamW(rounding=...)`: which parameters, which state, what a checkpoint keeps."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from raco_fast.backends import choose, reference
from raco_fast.backends.rounding import ROUNDINGS
from raco_fast.backends.types import AdamWOptions, Update
from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.optim.adamw_part import stepping
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"helpful": 0.3, "harmless": 0.7}
bf16 = torch.bfloat16


def network() -> nn.ModuleList:
    """A bfloat16 and a float32 layer."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(6, 9).to(bf16), nn.Linear(9, 2)])


def optimizer_of(model: nn.Module, **options) -> ClippedCAGradAdamW:
    defaults = {"lr": 2e-4, "betas": (0.8, 0.95), "weight_decay": 0.1, "weights": WEIGHTS, "c": 0.6}
    return ClippedCAGradAdamW(model.parameters(), **{**defaults, **options})


def train(model: nn.ModuleList, opt: ClippedCAGradAdamW, steps: range) -> None:
    for t in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        y = model[1](model[0](x.to(bf16)).tanh().float())
        opt.zero_grad()
        opt.backward({"helpful": y[:, 0].square().mean(), "harmless": (y.sum(1) - 1).abs().mean()})
        opt.step()


def everything(model: nn.Module, opt: ClippedCAGradAdamW) -> list[Tensor]:
    """Parameters and states, as bits: a residual may look like NaN."""
    tensors = [v for p in model.parameters() for v in (p.detach(), *opt.state[p].values())]
    return [t.view(torch.int16 if t.dtype == bf16 else torch.int32) for t in tensors]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, str, list[torch.dtype]]]:
    """(backend, rounding, dtypes) of every update."""
    calls = []
    for module in (choose.cpu, reference):

        def spied(update, *rest, name=module.name, real=module.combine_adamw):
            calls.append((name, update.rounding.name, [p.dtype for p in update.params]))
            return real(update, *rest)

        monkeypatch.setattr(module, "combine_adamw", spied)
    return calls


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_only_bfloat16_parameters_are_affected(rounding, ran):
    model, plain = network(), network()
    opt = optimizer_of(model, rounding=rounding)
    train(model, opt, range(1))
    train(plain, optimizer_of(plain), range(1))
    # Nothing depends on the bfloat16 layer's rounding before it is written.
    assert same([p.detach() for p in model[1].parameters()], [*plain[1].parameters()])
    if rounding == "nearest":
        assert ran[0] == ("cpu", "nearest", [bf16, bf16, torch.float32, torch.float32])
    else:
        assert ran[:2] == [
            ("cpu", rounding, [bf16, bf16]),
            ("cpu", "nearest", [torch.float32, torch.float32]),
        ]
    assert "backend: cpu\n" in repr(opt)
    assert f"rounding: {rounding}\n" in repr(opt)
    own = {"split_residual"} if rounding == "split" else set()
    for p in model.parameters():
        residual = own if p.dtype == bf16 else set()
        assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"} | residual


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_the_backends_agree(rounding):
    def run(backend: str) -> tuple[nn.ModuleList, ClippedCAGradAdamW]:
        model = network()
        opt = optimizer_of(model, rounding=rounding)
        with choose.backend(backend):
            train(model, opt, range(5))
        return model, opt

    (fast, fast_opt), (plain, plain_opt) = run("cpu"), run("reference")
    for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
        # Float32 rounding may tip a weight to the other neighbour, but not many.
        torch.testing.assert_close(p, q, rtol=2.0**-7, atol=1e-6)
        assert (p == q).double().mean() > 0.95
        for name, state in fast_opt.state[p].items():
            if not name.endswith("residual"):
                torch.testing.assert_close(state, plain_opt.state[q][name], rtol=2e-2, atol=1e-6)


def test_a_group_may_have_its_own_rounding(ran):
    model = network()
    groups = [
        {"params": [model[0].weight], "rounding": "split"},
        {"params": [model[0].bias]},
        {"params": model[1].parameters()},
    ]
    opt = ClippedCAGradAdamW(groups, weights=WEIGHTS, rounding="stochastic")
    train(model, opt, range(1))
    assert [(name, rounding) for name, rounding, _ in ran] == [
        ("cpu", "split"),
        ("cpu", "stochastic"),
        ("cpu", "nearest"),
    ]
    with pytest.raises(ValueError, match=r"`rounding` must be one of .* got 'up'; correct"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rounding": "up"})
    assert len(opt.param_groups) == 3


def test_split_weights_are_those_of_a_float32_run_with_the_same_states():
    model = network()
    opt = optimizer_of(model, rounding="split", rule="linear")
    p = model[0].weight
    master, m, v = p.detach().float(), torch.zeros_like(p), torch.zeros_like(p)
    for t in range(50):
        with choose.backend("reference"):
            train(model, opt, range(t, t + 1))
        alpha = opt.solution.coefficients
        grads = list(opt.gradients.of(p).values())
        wide = [m.float(), v.float()]
        options = AdamWOptions(lr=2e-4, beta1=0.8, beta2=0.95, weight_decay=0.1)
        states, step = [[s] for s in wide], [torch.tensor(float(t))]
        update = Update([master], [[g.float()] for g in grads], *states, [], step, options)
        reference.combine_adamw(update, torch.as_tensor(alpha))
        m, v = (s.to(bf16) for s in wide)
    low = opt.state[p]["split_residual"].view(torch.int16).int()
    stored = ((p.detach().view(torch.int16).int() << 16) + low).view(torch.float32)
    assert torch.equal(stored, master)
    assert torch.equal(opt.state[p]["exp_avg"], m)


def test_the_seed_and_nothing_else_decides_the_noise():
    def run(**options) -> list[Tensor]:
        model = network()
        opt = optimizer_of(model, rounding="stochastic", **options)
        train(model, opt, range(3))
        torch.rand(7)  # torch's generator has no say
        return everything(model, opt)

    first = run(seed=3)
    assert same(first, run(seed=3))
    assert same(first, run(seed=3 + 2**32))
    assert not same(first, run(seed=4))
    assert not same(run(seed=-1), run())


def test_groups_and_steps_draw_different_noise():
    params = [nn.Parameter(torch.full((500,), 1.0, dtype=bf16)) for _ in range(2)]
    groups = [{"params": [p]} for p in params]
    opt = ClippedCAGradAdamW(groups, lr=1e-3, weights=[1.0], c=0.0, rounding="stochastic")
    moved = []
    for _ in range(2):
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        opt.step()
        moved += [p.detach() != 1 for p in params]
    for i, a in enumerate(moved):
        assert 0.1 < a.double().mean() < 0.9
        assert not any(torch.equal(a, b) for b in moved[:i])


def test_parameters_that_are_updated_one_by_one_draw_different_noise():
    params = [nn.Parameter(torch.ones(500, dtype=bf16)) for _ in range(3)]
    opt = ClippedCAGradAdamW(params, lr=1e-3, weights=[1.0], c=0.0, rounding="stochastic")
    step = stepping(opt.param_groups, opt.state, opt.rounding, opt.seed)  # of step_in_backward
    for p in params:
        p.grad = torch.ones_like(p)
        step(p)
    moved = [p.detach() != 1 for p in params]
    for i, a in enumerate(moved):
        assert 0.1 < a.double().mean() < 0.9
        assert not any(torch.equal(a, b) for b in moved[:i])


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_checkpoints_continue_to_the_last_bit(rounding):
    whole, model = network(), network()
    whole_opt = optimizer_of(whole, rounding=rounding, seed=8)
    train(whole, whole_opt, range(8))
    first = optimizer_of(model, rounding=rounding, seed=8)
    train(model, first, range(4))
    saved = pickle.loads(pickle.dumps(first.state_dict()))
    second = optimizer_of(model)
    second.load_state_dict(saved)
    assert (second.rounding, second.seed) == (rounding, 8)
    train(model, second, range(4, 8))
    assert same(everything(model, second), everything(whole, whole_opt))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_copies_continue_alike(rounding, copied):
    model = network()
    opt = optimizer_of(model, rounding=rounding, seed=5)
    train(model, opt, range(3))
    other_model, other = copied((model, opt))
    for pair in ((model, opt), (other_model, other)):
        train(*pair, range(3, 6))
    assert same(everything(model, opt), everything(other_model, other))


def test_torch_distributed_checkpoint_keeps_the_residuals():
    model, fresh = network(), network()
    opt = optimizer_of(model, rounding="split")
    train(model, opt, range(3))
    state = get_optimizer_state_dict(model, opt)
    fresh_opt = optimizer_of(fresh, rounding="split")
    set_optimizer_state_dict(fresh, fresh_opt, state)
    fresh.load_state_dict(model.state_dict())
    assert same(everything(fresh, fresh_opt), everything(model, opt))


def test_a_residual_is_only_of_the_weight_beside_it():
    """Split rounding that is left and taken up again begins with the weights as they are then."""
    model = network()
    opt = optimizer_of(model, rounding="split")
    train(model, opt, range(3))
    assert opt.state[model[0].weight]["split_residual"].view(torch.int16).any()
    opt.rounding = "nearest"
    train(model, opt, range(3, 4))
    assert "split_residual" not in opt.state[model[0].weight]
    opt.rounding = "split"
    saved = opt.state_dict()  # has them before the next step: a reader need not guess
    assert not saved["state"][0]["split_residual"].view(torch.int16).any()
    assert "split_residual" not in saved["state"][2]  # float32


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_checkpoints_pass_to_adamw_and_back(rounding):
    model = network()
    adamw = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.1)

    def step_of_adamw() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        adamw.step()

    step_of_adamw()
    opt = optimizer_of(model, rounding=rounding, seed=2)
    opt.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert (opt.rounding, opt.seed) == (rounding, 2)
    train(model, opt, range(2))
    state = opt.state[model[0].weight]
    assert state["step"] == 3
    if rounding == "split":
        assert state["split_residual"].view(torch.int16).any()
    adamw.load_state_dict(opt.state_dict())
    step_of_adamw()
    assert adamw.state[model[0].weight]["step"] == 4


def test_wrong_arguments():
    for options, error, message in [
        ({"rounding": "up"}, ValueError, "`rounding` must be one of .* got 'up'; correct the"),
        ({"rounding": "kahan"}, ValueError, "got 'kahan', which is gone: .* use rounding='split'"),
        ({"rounding": "split", "differentiable": True}, ValueError, "'split' has no derivative"),
        ({"seed": 0.5}, TypeError, "`seed` must be an integer, got 0.5"),
    ]:
        with pytest.raises(error, match=message):
            optimizer_of(network(), **options)


def test_the_trainers_settings_reach_the_optimizer():
    settings = {"model": None, "data": [DataSource("pairs.jsonl")], "weights": WEIGHTS}
    config = TrainConfig(**settings, rounding="stochastic", seed=17)
    opt = ClippedCAGradAdamW([nn.Parameter(torch.ones(2))], **config.optimizer_arguments)
    assert (opt.rounding, opt.seed) == ("stochastic", 17)
    with pytest.raises(ValueError, match=r"`rounding` must be one of .* got 'up'"):
        TrainConfig(**settings, rounding="up")
