"""`ClippedCAGradAdamW` on a CUDA device: whole runs against float64, its states and its scaler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ClippedCAGradAdamW, solve_dual

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ADAMW = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(37, 11), (513,), (), (64, 40), (1,), (128, 1024)]
STEPS = 20


def weights(m: int) -> dict[str, float]:
    return {f"o{i}": (i + 1) / (m * (m + 1) / 2) for i in range(m)}


def starts(device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    """The same numbers in every dtype on every device: those that bfloat16 has."""
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randn(s, generator=generator).bfloat16() for s in SHAPES]
    return [nn.Parameter(p.to(device, dtype)) for p in draw]


def slopes(t: int, m: int, device: str, dtype: torch.dtype) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(t)
    common = [torch.randn(s, generator=generator) for s in SHAPES]
    return [
        [(c + (1 + i) * torch.randn(c.shape, generator=generator)).bfloat16().to(device, dtype)
         for c in common]
        for i in range(m)
    ]  # fmt: skip


def trained(device: str, dtype: torch.dtype, m: int, **options: Any) -> list[nn.Parameter]:
    params = starts(device, dtype)
    opt = ClippedCAGradAdamW(
        params, **ADAMW, weights=weights(m), c=0.6, max_grad_norm=90.0, **options
    )
    for t in range(STEPS):
        every = slopes(t, m, device, dtype)
        opt.backward([sum((p * g).sum() for p, g in zip(params, one, strict=True))
                      for one in every])  # fmt: skip
        opt.step()
        opt.zero_grad()
    assert opt.skipped_steps == 0
    return params


def trained_in_float64(m: int) -> list[nn.Parameter]:
    """torch's AdamW on the CPU, along the combination of the exact solver."""
    params = starts("cpu", torch.float64)
    opt = torch.optim.AdamW(params, **ADAMW)
    for t in range(STEPS):
        every = slopes(t, m, "cpu", torch.float64)
        G = torch.stack([torch.cat([g.flatten() for g in one]) for one in every])
        direction = solve_dual(G @ G.T, weights(m), 0.6).coefficients @ G
        parts = direction.split([p.numel() for p in params])
        for p, g in zip(params, parts, strict=True):
            p.grad = g.view_as(p).clone()
        nn.utils.clip_grad_norm_(params, 90.0)
        opt.step()
    return params


def error(params: list[nn.Parameter], truth: list[nn.Parameter]) -> float:
    """In all, as the largest of so many elements is a matter of chance."""
    return sum(
        float((p.detach().cpu().double() - q.detach()).abs().sum())
        for p, q in zip(params, truth, strict=True)
    )


@pytest.mark.parametrize("m", [1, 2, 3, 9])
def test_a_run_in_float32_is_as_close_to_float64_as_plain_torch_on_the_cpu(m):
    truth = trained_in_float64(m)
    with raco_fast.backend("reference"):
        plain = error(trained("cpu", torch.float32, m), truth)
    with raco_fast.backend("triton"):
        assert error(trained("cuda", torch.float32, m), truth) <= 2 * plain


@pytest.mark.parametrize("m", [2, 9])
def test_the_kernels_are_what_runs(m):
    """Unforced, they run as well: the self-test on this device has found nothing."""
    with raco_fast.backend("triton"):
        forced = trained("cuda", torch.float32, m)
    assert all(map(torch.equal, trained("cuda", torch.float32, m), forced))


@pytest.mark.parametrize("rounding", ["nearest", "split"])
def test_bfloat16_is_as_close_as_on_the_cpu(rounding):
    truth = trained_in_float64(3)
    on_cpu = error(trained("cpu", torch.bfloat16, 3, rounding=rounding), truth)
    assert error(trained("cuda", torch.bfloat16, 3, rounding=rounding), truth) <= 1.2 * on_cpu


def test_stochastic_rounding_repeats_and_is_as_close_as_on_the_cpu():
    options = {"rounding": "stochastic"}
    first, again = (trained("cuda", torch.bfloat16, 2, **options) for _ in range(2))
    assert all(map(torch.equal, first, again))
    truth = trained_in_float64(2)
    assert error(first, truth) <= 1.2 * error(trained("cpu", torch.bfloat16, 2, **options), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_from_one_device_to_the_other(dtype):
    def step(params: list[nn.Parameter], opt: ClippedCAGradAdamW, t: int) -> None:
        every = slopes(t, 2, params[0].device.type, dtype)
        opt.backward([sum((p * g).sum() for p, g in zip(params, one, strict=True))
                      for one in every])  # fmt: skip
        opt.step()
        opt.zero_grad()

    def run(devices: tuple[str, str]) -> list[Tensor]:
        params = starts(devices[0], dtype)
        opt = ClippedCAGradAdamW(params, **ADAMW, weights=weights(2), rounding="split")
        for t in range(3):
            step(params, opt, t)
        moved = [nn.Parameter(p.detach().to(devices[1])) for p in params]
        new = ClippedCAGradAdamW(moved, **ADAMW, weights=weights(2), rounding="split")
        new.load_state_dict(copy.deepcopy(opt.state_dict()))
        for t in range(3, 6):
            step(moved, new, t)
        return [p.detach().cpu().double() for p in moved]

    for devices in (("cpu", "cuda"), ("cuda", "cpu")):
        moved, stayed = run(devices), run(("cuda", "cuda"))
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        assert (
            max(float((a - b).abs().max()) for a, b in zip(moved, stayed, strict=True)) < tolerance
        )


def test_an_overflow_under_a_gradient_scaler_skips_the_step():
    params = starts("cuda", torch.float32)
    opt = ClippedCAGradAdamW(params, **ADAMW, weights=weights(2))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    before = [p.detach().clone() for p in params]
    for overflows in (True, False):
        factor = float("inf") if overflows else 1.0
        losses = [factor * sum((p * g).sum() for p, g in zip(params, one, strict=True))
                  for one in slopes(0, 2, "cuda", torch.float32)]  # fmt: skip
        opt.backward([scaler.scale(loss) for loss in losses])
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        same = all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        assert same == overflows
