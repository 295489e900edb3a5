"""With one objective and c = 0 it must pass for `torch.optim.AdamW`.

The inputs, the wrong inputs and the schedulers are torch's own, from the OptimizerInfo for AdamW
in `torch.testing._internal.common_optimizers`; equality is to the last bit unless said otherwise.
That is promised of the reference backend, which hands G0 to torch's own `adamw`; the C++ backend
rounds less often, and tests/optim/test_on_cpu.py holds it to float64.
Left out: configurations for several devices, and CUDA-only ones on a machine without CUDA.
"""

import copy
import functools
import itertools
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from raco_fast.backends import choose
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

INFO = next(info for info in optim_db if info.optim_cls is AdamW)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
Ours = functools.partial(ClippedCAGradAdamW, weights=[1.0], c=0.0)


@pytest.fixture(autouse=True)
def reference_backend():
    with choose.backend("reference"):
        yield


def inputs(device: str = "cpu", dtype: torch.dtype | None = None) -> list:
    return INFO.optim_inputs_func(device=device, dtype=dtype)


CONFIGS = [
    pytest.param(device, config.kwargs, id=f"{device}-{config.desc}")
    for device in DEVICES
    for config in inputs(device)
]
IMPLEMENTATIONS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]


def network(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 1)).to(device, dtype)


def loss_of(model: nn.Module, t: int = 0) -> Tensor:
    p = next(model.parameters())
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(t)).to(p)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def train(
    model: nn.Module, opt: torch.optim.Optimizer, steps: range, scheduler=None
) -> list[float]:
    losses = []
    for t in steps:
        opt.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.item())
        elif scheduler is not None:
            scheduler.step()
    return losses


def check_same(a: nn.Module, opt_a, b: nn.Module, opt_b) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        state, other = opt_a.state[p], opt_b.state[q]
        assert state.keys() == other.keys()
        for name, value in state.items():
            assert value.dtype == other[name].dtype
            assert value.device == other[name].device
            assert torch.equal(value, other[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize(("device", "kwargs"), CONFIGS)
def test_every_input_of_torch(device, kwargs, implementation):
    both = {**kwargs, **implementation}
    if implementation.get("foreach") and isinstance(kwargs.get("lr"), Tensor):
        both["capturable"] = True
    models = [network(device=device) for _ in range(2)]
    ours, theirs = Ours(models[0].parameters(), **both), AdamW(models[1].parameters(), **both)
    assert train(models[0], ours, range(6)) == train(models[1], theirs, range(6))
    check_same(models[0], ours, models[1], theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("kwargs", [c.kwargs for c in inputs(dtype=torch.float16)], ids=str)
@pytest.mark.filterwarnings("ignore:rounding to nearest loses")
def test_every_dtype(dtype, kwargs):
    p, q = (nn.Parameter(torch.linspace(-1, 2, 12).to(dtype)) for _ in range(2))
    ours, theirs = Ours([p], **kwargs), AdamW([q], **kwargs)
    for _ in range(5):
        for x, opt in ((p, ours), (q, theirs)):
            opt.zero_grad()
            (x * (1 + x)).abs().sum().backward()
            opt.step()
    assert torch.equal(p, q)
    assert ours.state[p]["exp_avg"].dtype == dtype


def test_float64_default_dtype_makes_float64_steps():
    torch.set_default_dtype(torch.float64)
    try:
        models = [network(torch.float64) for _ in range(2)]
        ours, theirs = Ours(models[0].parameters()), AdamW(models[1].parameters())
        for model, opt in zip(models, (ours, theirs), strict=True):
            train(model, opt, range(2))
        check_same(models[0], ours, models[1], theirs)
        assert ours.state[models[0][0].weight]["step"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.optimizer_error_input.desc)
def test_every_wrong_input_of_torch(error):
    wrong = error.optimizer_error_input
    params = [nn.Parameter(torch.randn(2, 3))] if wrong.params is None else wrong.params
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            Ours(params, **wrong.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            Ours(params, **wrong.kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, "`fused` does not support `differentiable`"),
    ],
)
def test_implementations_that_exclude_each_other(kwargs, message):
    with pytest.raises(RuntimeError, match=message):
        Ours(network().parameters(), **kwargs)


@pytest.mark.parametrize("config", inputs(), ids=lambda c: c.desc)
def test_fifty_steps_with_schedule_and_weight_decay(config):
    kwargs = {"weight_decay": 0.05, **config.kwargs}
    models = [network() for _ in range(2)]
    opts = [Ours(models[0].parameters(), **kwargs), AdamW(models[1].parameters(), **kwargs)]
    runs = [
        train(model, opt, range(50), OneCycleLR(opt, max_lr=0.05, total_steps=60))
        for model, opt in zip(models, opts, strict=True)
    ]
    assert runs[0] == runs[1]
    check_same(models[0], opts[0], models[1], opts[1])


@pytest.mark.parametrize("limit", [0.05, 0.8, 1e3])
def test_clipping_is_clip_grad_norm_then_adamw(limit):
    ours, theirs = network(), network()
    opt = Ours(ours.parameters(), lr=0.01, weight_decay=0.05, max_grad_norm=limit)
    plain = AdamW(theirs.parameters(), lr=0.01, weight_decay=0.05)
    clipped = set()
    for t in range(50):
        opt.zero_grad()
        loss_of(ours, t).backward()
        opt.step()
        plain.zero_grad()
        loss_of(theirs, t).backward()
        clipped.add(bool(nn.utils.clip_grad_norm_(theirs.parameters(), limit) > limit))
        plain.step()
    assert clipped == {0.05: {True}, 0.8: {True, False}, 1e3: {False}}[limit]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert limit != 1e3 or torch.equal(p, q)


SCHEDULERS = [
    *itertools.chain.from_iterable(
        s if isinstance(s, (tuple, list)) else (s,) for s in INFO.scheduler_inputs
    ),
    lambda opt: CosineAnnealingLR(opt, T_max=7, eta_min=1e-4),
    lambda opt: SequentialLR(
        opt, [LambdaLR(opt, lambda t: (t + 1) / 4), CosineAnnealingLR(opt, T_max=6)], milestones=[4]
    ),
]


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("make", SCHEDULERS)
def test_schedulers(make, number):
    models = [network() for _ in range(2)]
    opts = [
        Ours(models[0].parameters(), lr=number(0.01)),
        AdamW(models[1].parameters(), lr=number(0.01)),
    ]
    runs = [
        train(model, opt, range(12), make(opt)) for model, opt in zip(models, opts, strict=True)
    ]
    assert runs[0] == runs[1]
    assert float(opts[0].param_groups[0]["lr"]) == float(opts[1].param_groups[0]["lr"])


@pytest.mark.parametrize("config", inputs(), ids=lambda c: c.desc)
def test_param_groups_lazily_configured_and_added(config):
    models = [network() for _ in range(2)]
    opts = []
    for model, make in zip(models, (Ours, AdamW), strict=True):
        first = [{"params": [model[0].weight], **config.kwargs}, {"params": [model[0].bias]}]
        opt = make(first, lr=0.03, weight_decay=0.2)
        train(model, opt, range(2))
        opt.add_param_group({"params": model[2].parameters(), "lr": 0.5, "betas": (0.5, 0.6)})
        train(model, opt, range(2, 5))
        opt.param_groups[0]["lr"] = 0.1
        train(model, opt, range(5, 7))
        opts.append(opt)
    check_same(models[0], opts[0], models[1], opts[1])


def test_named_parameters():
    model = network()
    opt = Ours(model.named_parameters(), lr=0.01)
    names = [name for name, _ in model.named_parameters()]
    assert opt.param_groups[0]["param_names"] == names
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    train(model, opt, range(2))
    plain = network()
    train(plain, AdamW(plain.parameters(), lr=0.01), range(2))
    assert torch.equal(model[0].weight, plain[0].weight)


def test_steps_without_gradients_do_nothing():
    model = network()
    opt = Ours(model.parameters(), weight_decay=0.5)
    opt.step()
    assert len(opt.state) == 0
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True)
    )


def test_steps_along_zero_gradients_only_decay():
    p = nn.Parameter(torch.tensor([2.0, -4.0]))
    opt = Ours([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(2)
    opt.step()
    torch.testing.assert_close(p, torch.tensor([1.9, -3.8]))


@pytest.mark.parametrize("config", inputs(), ids=lambda c: c.desc)
@pytest.mark.parametrize("makers", list(itertools.product([Ours, AdamW], repeat=2)))
def test_checkpoints_pass_between_adamw_and_ours(makers, config):
    whole = network()
    train(whole, opt_whole := AdamW(whole.parameters(), **config.kwargs), range(6))
    model = network()
    first = makers[0](model.parameters(), **config.kwargs)
    train(model, first, range(3))
    saved = pickle.loads(pickle.dumps(first.state_dict()))
    second = makers[1](model.parameters(), lr=0.7)
    second.load_state_dict(saved)
    train(model, second, range(3, 6))
    check_same(model, second, whole, opt_whole)
    groups = second.state_dict()["param_groups"]
    assert ("raco" in groups[0]) is (Ours in makers)
    for group in groups:
        for key in [key for key in group if key.startswith("raco")]:
            del group[key]
    assert groups == opt_whole.state_dict()["param_groups"]


def test_state_dict_has_adamws_layout_and_is_deterministic():
    model = network()
    opt = Ours(model.parameters(), amsgrad=True)
    train(model, opt, range(3))
    first, second = opt.state_dict(), opt.state_dict()
    assert set(first) == {"state", "param_groups", "raco"}
    assert first["param_groups"] == second["param_groups"]
    assert list(first["state"]) == [0, 1, 2, 3]
    assert set(first["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert first["raco"]["weights"] == {"0": 1.0}


def test_checkpoints_older_than_a_flag_load():
    model = network()
    opt = Ours(model.parameters())
    train(model, opt, range(2))
    old = copy.deepcopy(opt.state_dict())
    del old["raco"], old["param_groups"][0]["raco"]
    for flag in INFO.not_og_supported_flags:
        del old["param_groups"][0][flag]
    for state in old["state"].values():
        state["step"] = state["step"].item()
    opt.load_state_dict(old)
    assert opt.param_groups[0]["maximize"] is False
    train(model, opt, range(2, 4))
    plain = network()
    train(plain, plain_opt := AdamW(plain.parameters()), range(4))
    check_same(model, opt, plain, plain_opt)


def test_load_state_dict_checks_the_groups():
    saved = Ours(network().parameters()).state_dict()
    other = Ours([{"params": [p]} for p in network().parameters()])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("config", inputs(), ids=lambda c: c.desc)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_deepcopy_and_pickle(copied, config):
    model = network()
    opt = Ours(model.parameters(), **config.kwargs)
    train(model, opt, range(3))
    twin, twin_opt = copied((model, opt))
    train(model, opt, range(3, 6))
    train(twin, twin_opt, range(3, 6))
    check_same(model, opt, twin, twin_opt)


def test_step_hooks_run_once():
    calls = []
    model = network()
    AdamW(network().parameters())  # patches AdamW.step, which ours must not run as well
    opt = Ours(model.parameters())
    opt.register_step_pre_hook(
        lambda o, args, kwargs: calls.append(("pre", o is opt, len(o.state)))
    )
    handle = opt.register_step_post_hook(
        lambda o, a, k: calls.append(("post", o is opt, len(o.state)))
    )
    everywhere = register_optimizer_step_post_hook(
        lambda o, a, k: calls.append(("global", o is opt, 0))
    )
    try:
        train(model, opt, range(1))
    finally:
        everywhere.remove()
    assert calls == [("pre", True, 0), ("post", True, 4), ("global", True, 0)]
    handle.remove()
    train(model, opt, range(1))
    assert calls[3:] == [("pre", True, 4)]


def test_pre_hook_may_replace_the_closure():
    model = network()
    opt = Ours(model.parameters())

    def closure() -> float:
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    assert opt.step() == pytest.approx(loss_of(network()).item())


def test_state_dict_hooks():
    model = network()
    opt = Ours(model.parameters(), lr=0.5)
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("save"))
    opt.register_state_dict_post_hook(lambda o, d: d["param_groups"][0].update(lr=0.25))
    saved = opt.state_dict()
    other = Ours(model.parameters(), lr=0.1)
    other.register_load_state_dict_pre_hook(
        lambda o, d: d.update(param_groups=[{**d["param_groups"][0], "eps": 0.125}])
    )
    other.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    other.load_state_dict(saved)
    assert calls == ["save", "loaded"]
    assert other.param_groups[0]["lr"] == 0.25
    assert other.param_groups[0]["eps"] == 0.125


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr_equals_float_lr(dtype):
    models = [network(dtype) for _ in range(2)]
    opts = [
        Ours(models[0].parameters(), lr=torch.tensor(0.03)),
        Ours(models[1].parameters(), lr=0.03),
    ]
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, range(5))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert isinstance(opts[0].param_groups[0]["lr"], Tensor)


def test_differentiable():
    results = []
    for make in (Ours, AdamW):
        p = torch.linspace(1, 2, 5, requires_grad=True)
        d = torch.tensor(0.3, requires_grad=True)
        opt = make([q := p.clone()], lr=0.1, weight_decay=0.2, differentiable=True)
        q.grad = p * d
        opt.step()
        results.append(torch.autograd.grad(q.square().sum(), [p, d]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].abs() > 0


def test_grad_scaler_and_fused_grad_scale():
    for fused in (None, True):
        models = [network() for _ in range(2)]
        ours = Ours(models[0].parameters(), fused=fused)
        theirs = AdamW(models[1].parameters(), fused=fused)
        for model, opt in zip(models, (ours, theirs), strict=True):
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            for t in range(4):
                opt.zero_grad()
                loss = loss_of(model, t) * (float("inf") if t == 1 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
            assert scaler.get_scale() == 128.0
        check_same(models[0], ours, models[1], theirs)
        assert ours.skipped_steps == 1


def test_gradients_of_another_layout():
    models = [network() for _ in range(2)]
    opts = [Ours(models[0].parameters()), AdamW(models[1].parameters())]
    for model, opt in zip(models, opts, strict=True):
        loss_of(model).backward()
        weight = model[0].weight
        weight.grad = weight.grad.t().contiguous().t()
        opt.step()
    check_same(models[0], opts[0], models[1], opts[1])


def test_zero_size_parameters():
    p, empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0, 3))
    opt = Ours([p, empty], lr=0.1)
    (p.sum() + empty.sum()).backward()
    opt.step()
    assert opt.state[empty]["step"].item() == 1.0
    assert (p < 1).all()


def test_it_stays_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        train(model, Ours(model.parameters()), range(2))
