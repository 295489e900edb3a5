"""Steps that stay on the device: the same as steps through the host, and nothing is read back."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from raco_fast import ClippedCAGradAdamW
from raco_fast.backends import choose, cuda

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("as_on_cuda"),
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(37, 11), (513,), (), (1,)]
WEIGHTS = {"a": 0.7, "b": 0.3}
LIMITS = {1: 55.5, 2: 50.3}  # about the median norm of G0 below
SETTINGS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "c": 0.6, "max_grad_norm": 40.0}


@contextmanager
def nothing_is_read_back() -> Iterator[None]:
    """Every road of a number from a tensor to Python raises; on a device, torch watches itself."""
    if not INTERPRETED:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def refuse(self: Tensor, *args: Any) -> Any:
        raise AssertionError("a number was read back from the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "nonzero"):
            patch.setattr(Tensor, name, refuse)
        yield


def parameters(device: torch.device) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]


def groups(params: list[torch.nn.Parameter], lr: Any = 0.02) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "lr": lr, "weight_decay": 0.1},
        {"params": params[2:], "lr": 0.05, "weight_decay": 0.02, "maximize": True},
    ]


def fill(opt: ClippedCAGradAdamW, params: list[torch.nn.Parameter], t: int, factor=1.0) -> None:
    """Gradients of step t: in conflict, or every fifth time alike."""
    generator = torch.Generator().manual_seed(t)
    m = len(opt.objective_names)
    common, *own = ([torch.randn(s, generator=generator) for s in SHAPES] for _ in range(m + 1))
    losses = []
    for i, one in enumerate(own):
        mix = [c if t % 5 == 4 else 0.5 * c - (1 + i) * g for c, g in zip(common, one, strict=True)]
        losses.append(
            sum((factor * g.to(p.device) * p).sum() for g, p in zip(mix, params, strict=True))
        )
    opt.backward(losses)


def run(opt: ClippedCAGradAdamW, params: list[torch.nn.Parameter], steps: int = 5) -> list[Any]:
    found = []
    for t in range(steps):
        fill(opt, params, t)
        if opt.defaults["capturable"] and t > 0:
            with nothing_is_read_back():
                opt.step()
        else:
            opt.step()
        opt.zero_grad()
        solution = opt.solution
        found.append((solution.coefficients, solution.clip_active, solution.update_norm))
    return found


@pytest.mark.parametrize("capturable", [True, False])
def test_autograd_notices_that_a_step_has_changed_what_it_saved(capturable, device):
    params = parameters(device)
    opt = ClippedCAGradAdamW(groups(params), **SETTINGS, weights=WEIGHTS, capturable=capturable)
    saved = sum(p.square().sum() for p in params)
    fill(opt, params, 0)
    opt.step()
    assert all(p._version > 0 for p in params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_what_was_concluded_is_not_asked_at_every_step(device, monkeypatch):
    params = parameters(device)
    opt = ClippedCAGradAdamW(groups(params), **SETTINGS, weights=WEIGHTS, capturable=True)
    asked = []
    real = cuda.obstacle
    monkeypatch.setattr(cuda, "obstacle", lambda *a: asked.append(a) or real(*a))
    run(opt, params, 1)
    first = len(asked)
    run(opt, params, 3)
    assert 0 < first == len(asked)


@pytest.mark.parametrize("names", ["ab", "a"])
def test_the_same_as_steps_through_the_host(names, device):
    total = sum(WEIGHTS[n] for n in names)
    settings = {**SETTINGS, "max_grad_norm": LIMITS[len(names)]}
    weights = {n: WEIGHTS[n] / total for n in names}
    ours, theirs = parameters(device), parameters(device)
    opt = ClippedCAGradAdamW(groups(ours), **settings, weights=weights, capturable=True)
    plain = ClippedCAGradAdamW(groups(theirs), **settings, weights=weights)
    found, expected = run(opt, ours), run(plain, theirs)
    assert opt._on_device is not None
    for (alpha, active, norm), (beta, plain_active, plain_norm) in zip(
        found, expected, strict=True
    ):
        torch.testing.assert_close(alpha, beta, rtol=1e-4, atol=1e-6)
        assert active == plain_active
        assert norm == pytest.approx(plain_norm, rel=1e-5)
    if len(names) == 2:
        assert {active for _, active, _ in found} == {True, False}
    assert {norm > settings["max_grad_norm"] for _, _, norm in found} == {True, False}
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert opt.state[p]["step"].item() == 5.0
        assert opt.state[p]["step"].device == p.device


def test_a_skipped_step_leaves_everything_and_is_counted_when_asked(device):
    params = parameters(device)
    opt = ClippedCAGradAdamW(groups(params), **SETTINGS, weights=WEIGHTS, capturable=True)
    run(opt, params, 2)
    before = copy.deepcopy((params, opt.state_dict()["state"]))
    fill(opt, params, 3, factor=float("inf"))
    with nothing_is_read_back():
        opt.step()
    assert opt.skipped_steps == 1
    assert opt.solution.finite is False
    state = opt.state_dict()["state"]
    assert all(torch.equal(p, q) for p, q in zip(before[0], params, strict=True))
    assert all(torch.equal(before[1][k][n], state[k][n]) for k in state for n in state[k])
    opt.zero_grad()
    run(opt, params, 2)
    assert opt.skipped_steps == 1
    assert opt.state[params[0]]["step"].item() == 4.0


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_loss_scale_and_found_inf_are_read_on_the_device(found_inf, device):
    ours, theirs = parameters(device), parameters(device)
    opt = ClippedCAGradAdamW(groups(ours), **SETTINGS, weights=WEIGHTS, capturable=True)
    plain = ClippedCAGradAdamW(groups(theirs), **SETTINGS, weights=WEIGHTS, capturable=True)
    for t in range(2):
        fill(opt, ours, t, factor=2.0**12)
        opt.grad_scale = torch.full((), 2.0**12, device=device)
        opt.found_inf = torch.full((1,), found_inf * t, device=device)
        opt.step()
        opt.zero_grad()
        if not found_inf * t:
            fill(plain, theirs, t)
            plain.step()
            plain.zero_grad()
    assert opt.skipped_steps == found_inf
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert opt.state[p]["step"].item() == 2.0 - found_inf


def test_copies_and_checkpoints_take_the_solution_to_the_host(device):
    params = parameters(device)
    opt = ClippedCAGradAdamW(groups(params), **SETTINGS, weights=WEIGHTS, capturable=True)
    run(opt, params, 2)
    fill(opt, params, 2, factor=float("nan"))
    opt.step()
    other = copy.deepcopy(opt)
    assert other._on_device is None
    assert other.skipped_steps == opt.state_dict()["raco"]["skipped_steps"] == 1
    assert other.solution.finite is False
    opt.load_state_dict(opt.state_dict())
    assert opt.skipped_steps == 1


def test_where_the_step_cannot_stay_on_the_device_it_goes_through_the_host(device):
    params = parameters(device)
    four = dict.fromkeys("abcd", 0.25)
    opt = ClippedCAGradAdamW(groups(params), **SETTINGS, weights=four, capturable=True)
    run_once = lambda: (fill(opt, params, 0), opt.step(), opt.zero_grad())  # noqa: E731
    with choose.backend("triton"):
        run_once()
    assert opt._on_device is None
    assert opt.solution.finite


@pytest.mark.parametrize(
    ("m", "rule", "change", "reason"),
    [
        (4, "linear", {}, "the dual problem of m = 4 objectives is solved on the host"),
        (2, "nash", {}, "the rule 'nash' is solved on the host"),
        (2, "mgda", {"amsgrad": True}, "its kernels do not have amsgrad=True"),
        (2, "mgda", {"capturable": False}, "a parameter group has capturable=False"),
        (2, "mgda", {}, None),
    ],
)
def test_why_a_step_waits(m, rule, change, reason, device):
    params = parameters(device)
    weights = dict.fromkeys("abcd"[:m], 1 / m)
    opt = ClippedCAGradAdamW(groups(params), **SETTINGS, weights=weights, capturable=True)
    opt.rule = rule
    opt.param_groups[1].update(change)
    fill(opt, params, 0)
    reduced = opt.gradients.reduced(group["params"] for group in opt.param_groups)
    with torch.no_grad():
        assert opt._waits(reduced) == reason
        with choose.backend("reference"):
            forced = opt._waits(reduced)
    assert forced == (reason if change == {"capturable": False} or m == 4 or rule == "nash"
                      else "backend 'reference' is forced")  # fmt: skip


def test_leaving_the_device_keeps_what_it_knew(device):
    params = parameters(device)
    opt = ClippedCAGradAdamW(groups(params), **SETTINGS, weights=WEIGHTS, capturable=True)
    run(opt, params, 1)
    fill(opt, params, 1, factor=float("nan"))
    opt.step()
    opt.zero_grad()
    for group in opt.param_groups:
        group["capturable"] = False
    run(opt, params, 1)
    assert opt._on_device is None
    assert opt.skipped_steps == 1
    assert opt.solution.finite
