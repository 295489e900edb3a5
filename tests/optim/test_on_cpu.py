"""`ClippedCAGradAdamW` on the C++ backend: whole runs against float64, and what it hands over."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from raco_fast.backends import choose, cpu, reference
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.solver.dual import solve_dual

WEIGHTS = {"helpful": 0.5, "harmless": 0.2, "concise": 0.3}
ADAMW = {"betas": (0.8, 0.95), "eps": 1e-6}
SHAPES = [(37, 11), (513,), (), (64, 40)]
LIMIT = 104.2  # about the median norm of G0 here


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The functions that ran, as module.function."""
    names: list[str] = []
    both = ("gram", "combine_adamw")
    real = {(module, f): getattr(module, f) for module in (cpu, reference) for f in both}
    for module in (cpu, reference):
        for operation in both:

            def spied(*args, module=module, operation=operation, **kwargs):
                names.append(f"{module.__name__.removeprefix('raco_fast.backends.')}.{operation}")
                return real[module, operation](*args, **kwargs)

            monkeypatch.setattr(module, operation, spied)
    return names


def starts(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [nn.Parameter(p.to(torch.bfloat16).to(dtype)) for p in draw]


def slopes(t: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """The three gradients of step t, the same numbers in every dtype; every fifth t they agree."""
    generator = torch.Generator().manual_seed(t)
    common, *own = (
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES] for _ in range(4)
    )
    agree = t % 5 == 4
    mixed = [
        [(c if agree else 0.5 * c - (1 + i) * g) for c, g in zip(common, one, strict=True)]
        for i, one in enumerate(own)
    ]
    return [[g.to(torch.bfloat16).to(dtype) for g in one] for one in mixed]


def groups(params: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": params[:2], "lr": 0.02, "weight_decay": 0.1},
        {"params": params[2:], "lr": 0.05, "weight_decay": 0.02, "betas": (0.7, 0.9)},
    ]


def losses(params: list[nn.Parameter], t: int) -> list[Tensor]:
    """Whose gradients are the slopes of step t."""
    every = slopes(t, params[0].dtype)
    return [sum((p * g).sum() for p, g in zip(params, one, strict=True)) for one in every]


def fifty_steps(dtype: torch.dtype, make_params=starts) -> list[nn.Parameter]:
    params = make_params(dtype)
    opt = ClippedCAGradAdamW(groups(params), **ADAMW, weights=WEIGHTS, c=0.6, max_grad_norm=LIMIT)
    schedule = OneCycleLR(opt, max_lr=[0.03, 0.06], total_steps=60)
    for t in range(50):
        opt.backward(losses(params, t))
        opt.step()
        opt.zero_grad()
        schedule.step()
    assert opt.skipped_steps == 0
    return params


def fifty_steps_in_float64() -> tuple[list[nn.Parameter], set[bool], set[bool]]:
    """torch's AdamW on G0, and whether both kinds of clipping were active in some steps."""
    params = starts(torch.float64)
    opt = torch.optim.AdamW(groups(params), **ADAMW)
    schedule = OneCycleLR(opt, max_lr=[0.03, 0.06], total_steps=60)
    norm_clipped, weights_clipped = set(), set()
    for t in range(50):
        G = torch.stack([torch.cat([g.flatten() for g in one]) for one in slopes(t, torch.float64)])
        solution = solve_dual(G @ G.T, WEIGHTS, 0.6)
        weights_clipped.add(solution.clip_active)
        parts = (solution.coefficients @ G).split([p.numel() for p in params])
        for p, g in zip(params, parts, strict=True):
            p.grad = g.view_as(p).clone()
        norm_clipped.add(bool(nn.utils.clip_grad_norm_(params, LIMIT) > LIMIT))
        opt.step()
        schedule.step()
    return params, norm_clipped, weights_clipped


def error(params: list[nn.Parameter], truth: list[nn.Parameter]) -> float:
    return float(
        sum((p.double() - q).detach().abs().sum() for p, q in zip(params, truth, strict=True))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_steps_against_float64(dtype, ran):
    truth, norm_clipped, weights_clipped = fifty_steps_in_float64()
    assert norm_clipped == weights_clipped == {True, False}
    ours = fifty_steps(dtype)
    assert set(ran) == {"cpu.gram", "cpu.combine_adamw"}
    assert len(ran) == 50 * 3  # one Gram and two groups
    with choose.backend("reference"):
        plain = fifty_steps(dtype)
    assert set(ran[150:]) == {"reference.gram", "reference.combine_adamw"}
    assert error(ours, truth) <= 2 * error(plain, truth)


def test_fifty_steps_give_the_same_bits_for_any_thread_count(monkeypatch):
    def run(threads: int) -> list[nn.Parameter]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return fifty_steps(torch.float32)

    one = run(1)
    for threads in (1, 2, 7):
        assert all(torch.equal(p, q) for p, q in zip(one, run(threads), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_leaves_weights_and_states_alone(bad, dtype, ran):
    params = starts(dtype)
    opt = ClippedCAGradAdamW(groups(params), **ADAMW, weights=WEIGHTS)

    def step(t: int, factor: float) -> None:
        opt.zero_grad()
        for i, (name, one) in enumerate(zip(WEIGHTS, slopes(t, dtype), strict=True)):
            with opt.objective(name):
                sum((p * g).sum() for p, g in zip(params, one, strict=True)).backward()
            if i == 1:
                opt.gradients.of(params[3])[name].view(-1)[5] *= factor
        opt.step()

    step(0, 1.0)
    before = copy.deepcopy((params, opt.state_dict()["state"]))
    step(1, bad)
    after = (params, opt.state_dict()["state"])
    assert ran == ["cpu.gram", "cpu.combine_adamw", "cpu.combine_adamw", "cpu.gram"]
    assert opt.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(before[0], after[0], strict=True))
    for k, state in before[1].items():
        assert all(torch.equal(value, after[1][k][name]) for name, value in state.items())


def test_every_group_has_its_own_backend(ran):
    params = starts(torch.float32)
    first, second = groups(params)
    opt = ClippedCAGradAdamW([first, {**second, "amsgrad": True}], **ADAMW, weights=WEIGHTS)
    assert "backend: cpu, reference\n" in repr(opt)
    opt.backward(
        [
            sum((p * g).sum() for p, g in zip(params, one, strict=True))
            for one in slopes(0, torch.float32)
        ]
    )
    opt.step()
    assert ran == ["cpu.gram", "cpu.combine_adamw", "reference.combine_adamw"]
    with choose.backend("cpu"), pytest.raises(RuntimeError, match="combine_adamw: amsgrad=True"):
        opt.step()


def test_a_gradient_of_another_layout_takes_its_group_to_the_reference(ran):
    params = starts(torch.float32)
    opt = ClippedCAGradAdamW(groups(params), **ADAMW, weights=[1.0], c=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    params[3].grad = torch.ones(40, 64).t()
    opt.step()
    assert ran == ["cpu.gram", "cpu.combine_adamw", "reference.combine_adamw"]


def test_checkpoints_pass_between_the_backends():
    def run(first: str, second: str) -> Tensor:
        p = starts(torch.float32)[3]
        opts = [ClippedCAGradAdamW([p], weights=[1.0], c=0.0, weight_decay=0.1) for _ in range(2)]
        for t, (opt, backend) in enumerate(zip(opts, (first, second), strict=True)):
            with choose.backend(backend):
                for s in range(3):
                    p.grad = slopes(3 * t + s, torch.float32)[0][3]
                    opt.step()
            opts[1].load_state_dict(copy.deepcopy(opt.state_dict()))
        return p.detach()

    expected = run("reference", "reference")
    for pair in (("cpu", "reference"), ("reference", "cpu"), ("cpu", "cpu")):
        torch.testing.assert_close(run(*pair), expected)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_autograd_notices_that_a_step_has_changed_what_it_saved(name):
    params = starts(torch.float32)
    opt = ClippedCAGradAdamW(groups(params), **ADAMW, weights=WEIGHTS)
    saved = sum(p.square().sum() for p in params)
    for t in range(2):  # the second step takes what the first one built
        opt.backward(losses(params, t))
        before = [p._version for p in params]
        with choose.backend(name):
            opt.step()
        assert all(p._version > version for p, version in zip(params, before, strict=True))
        opt.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_tables_are_built_once_for_gradients_that_stay_where_they_are(monkeypatch):
    params = starts(torch.float32)
    opt = ClippedCAGradAdamW(groups(params), **ADAMW, weights=WEIGHTS)
    built, real = [], cpu.tables
    monkeypatch.setattr(cpu, "tables", lambda *a: built.append(a) or real(*a))
    opt.backward(losses(params, 0))
    opt.step()
    assert len(built) == 3  # one Gram, two groups
    opt.step()
    assert len(built) == 3
    opt.state[params[0]]["exp_avg"] = opt.state[params[0]]["exp_avg"].clone()
    opt.step()
    assert len(built) == 4
