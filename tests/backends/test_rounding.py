"""The three roundings of bfloat16 weights in plain torch: the twin, and the reference's step."""

from dataclasses import replace
from typing import Any

import cuts
import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast.backends import reference
from raco_fast.backends.rounding import (
    ROUNDINGS,
    Place,
    Rounding,
    check_rounding,
    check_seed,
    random_bits,
)
from raco_fast.backends.types import AdamWOptions, Update

OPTIONS = AdamWOptions(lr=0.013, beta1=0.85, beta2=0.97, eps=1e-6, weight_decay=0.07)
bf16 = torch.bfloat16


def hashed(element: np.ndarray, seed: int, tensor: int, step: int) -> np.ndarray:
    """The 16 random bits, in Python's own integers."""

    def mix(x: Any, shifts: tuple[int, int, int], factors: tuple[int, int], key: Any = 0) -> Any:
        x = (x ^ (x >> shifts[0])) * factors[0] % 2**32
        x = ((x ^ (x >> shifts[1])) + key) * factors[1] % 2**32
        return x ^ (x >> shifts[2])

    def key(x: int) -> int:
        return mix(x % 2**32, (16, 15, 15), (0x21F0AAAD, 0x735A2D97))

    element = element.astype(object)
    place = tensor * 0x9E3779B1 + element // 2**32 * 0x85EBCA77
    first = key(key(seed ^ step * 0xC2B2AE35 % 2**32) ^ place % 2**32)
    second = key(first ^ place % 2**32)
    x = element % 2**32 ^ first
    return (mix(x, (16, 15, 16), (0x7FEB352D, 0x846CA68B), second) & 0xFFFF).astype(int)


@pytest.mark.parametrize("start", [0, 1 << 17, 5 << 32])
@pytest.mark.parametrize(("seed", "tensor", "step"), [(0, 0, 1), (12345, 3, 70_000), (2**32, 9, 2)])
def test_the_bits_are_the_hash(start, seed, tensor, step):
    element = np.arange(start, start + 300)
    expected = hashed(element, seed % 2**32, tensor, step)
    found = random_bits(torch.from_numpy(element), seed, tensor, torch.tensor(float(step)))
    assert (found.numpy() == expected).all()


def test_the_bits_are_random_in_every_argument():
    place: dict[str, Any] = {"seed": 99, "tensor": 3, "step": torch.tensor(7.0)}
    many = torch.arange(10_000)  # the hash is elementwise in all of its arguments
    of_elements = random_bits(many, **place).numpy()
    of_seeds, of_tensors, of_steps = [
        random_bits(many[77:78], **{**place, name: many}).numpy()
        for name in ("seed", "tensor", "step")
    ]
    for found in (of_elements, of_seeds, of_steps, of_tensors):
        assert abs(found.mean() / 65535 - 0.5) < 4 * 12**-0.5 / 100
        counts = np.bincount(found >> 10, minlength=64)
        assert ((counts - 156.25) ** 2 / 156.25).sum() < 63 + 4 * 126**0.5
        centred = found - found.mean()
        assert abs((centred[1:] * centred[:-1]).mean() / centred.var()) < 0.04
    for other in ({"seed": 100}, {"tensor": 4}, {"step": torch.tensor(8.0)}):
        others = random_bits(many, **{**place, **other}).numpy()
        assert abs(np.corrcoef(of_elements, others)[0, 1]) < 0.04


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased_over_ten_thousand_seeds():
    w = torch.tensor([1.0, -0.3, 3e-5, 700.0]) * (1 + torch.arange(4) / 1000)
    p, count = torch.empty(4, dtype=bf16), 10_000
    total = torch.zeros(4, dtype=torch.float64)
    for seed in range(count):
        Rounding("stochastic", seed=seed).store(w.clone(), p, 0, torch.tensor(3.0))
        total += p.double()
    spacing = torch.tensor([2.0**-7, 2.0**-9, 2.0**-22, 2.0])
    deviation = 0.5 * spacing / count**0.5  # at most, of the mean of two values so far apart
    assert (p.double() - w).abs().max() > 0  # it was not exact all along
    assert ((total / count - w).abs() < 4 * deviation).all()


def test_stochastic_rounding_counts_elements_in_the_order_of_memory():
    w = torch.randn(70_000, 3, generator=torch.Generator().manual_seed(0))
    assert w.numel() > 1 << 17  # more than one block
    flat, turned = torch.empty(70_000, 3, dtype=bf16), torch.empty(3, 70_000, dtype=bf16).t()
    for p in (flat, turned):
        rounding = Rounding("stochastic", seed=5)
        rounding.store(torch.empty_like(p, dtype=torch.float32).copy_(w), p, 2, torch.tensor(1.0))
    order = hashed(np.arange(w.numel()), 5, 2, 1)
    for p, noise in ((flat, order.reshape(70_000, 3)), (turned, order.reshape(3, 70_000).T)):
        raised = w.view(torch.int32) + torch.from_numpy(noise.astype(np.int32))
        assert torch.equal(p.float(), (raised & -0x10000).view(torch.float32))


@pytest.mark.parametrize("place", cuts.BEYOND_32_BITS, ids=str)
def test_a_shards_bits_are_those_of_its_elements_numbers(place):
    w, p = torch.randn(2000, generator=torch.Generator().manual_seed(2)), torch.empty(2000).to(bf16)
    rounding = Rounding("stochastic", seed=5, places=[Place(9), place])
    rounding.store(w.clone(), p, 1, torch.tensor(3.0))
    e = np.arange(2000).astype(object)
    number = place.offset + (e // place.width * place.pitch + e % place.width if place.width else e)
    raised = w.view(torch.int32) + torch.from_numpy(hashed(number, 5, place.tensor, 3)).int()
    assert torch.equal(p.float(), (raised & -0x10000).view(torch.float32))


@pytest.mark.parametrize("cut", cuts.CUTS)
def test_shards_are_rounded_as_the_whole(cut):
    whole = torch.randn(500, 400, generator=torch.Generator().manual_seed(3))
    expected, found = (torch.empty_like(whole, dtype=bf16) for _ in range(2))
    assert whole.numel() > 1 << 17  # more than one block
    step = torch.tensor(2.0)
    Rounding("stochastic", seed=8, places=[Place(3)]).store(whole.clone(), expected, 0, step)
    for index, place in cuts.shards(whole, cut, 3):
        w = whole[index].clone(memory_format=torch.contiguous_format)
        p = torch.empty_like(w, dtype=bf16)
        Rounding("stochastic", seed=8, places=[place]).store(w, p, 0, step)
        found[index] = p
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rounding", ["stochastic", "split"])
def test_rounding_in_integers_does_not_lose_nan_and_infinity(rounding):
    w = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 0.0])
    w.view(torch.int32)[0] = 0x7FFFFFFF  # NaN as devices write it
    p, residual = torch.zeros(5, dtype=bf16), torch.zeros(5, dtype=bf16)
    Rounding(rounding, [residual]).store(w, p, 0, torch.tensor(1.0))
    assert p.isnan().tolist() == [True, True, False, False, False]
    assert p[2:].tolist() == [torch.inf, -torch.inf, 0.0]


def test_split_gives_every_float32_back():
    edge = torch.tensor([0x3F808000, 0x3F807FFF, 0x3F7F8000, 0, 1, 0x7F7FFFFF, 0x00008000])
    bits_of_w = torch.cat([edge, torch.randint(0, 2**31 - 2**23, (5000,))]).int()
    for w in (bits_of_w.view(torch.float32), -bits_of_w.view(torch.float32)):
        p, residual = torch.empty_like(w, dtype=bf16), torch.empty_like(w, dtype=bf16)
        split = Rounding("split", [residual])
        split.store(w.clone(), p, 0, torch.tensor(1.0))
        assert torch.equal(split.opened(p, 0).view(torch.int32), w.view(torch.int32))
        finite = p.isfinite()
        torch.testing.assert_close(p[finite].float(), w[finite], rtol=2.0**-8, atol=1e-38)


class Run:
    """A run of `reference.combine_adamw` on one parameter; float32 states, where torch can."""

    def __init__(self, start: Tensor, rounding: str = "nearest", **options: Any) -> None:
        self.p, self.options = start.clone(), replace(OPTIONS, **options)
        has_residual = rounding == "split"
        self.rounding = Rounding(rounding, [torch.zeros_like(start)] * has_residual, seed=11)
        dtype = start.dtype if rounding == "nearest" else torch.float32
        self.states = [torch.zeros_like(start, dtype=dtype) for _ in range(3)]
        self.step = torch.zeros(())

    def take(self, grads: list[Tensor], alpha: list[float], lr: float) -> None:
        update = Update(
            [self.p],
            [[g] for g in grads],
            *[[s] for s in self.states[:2]],
            [self.states[2]] if self.options.amsgrad else [],
            [self.step],
            replace(self.options, lr=lr),
            self.rounding,
        )
        reference.combine_adamw(update, torch.tensor(alpha, dtype=torch.float64))

    def weight(self) -> Tensor:
        return self.rounding.opened(self.p, 0)


def gradient(t: int, n: int = 400) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(t)).to(bf16)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}])
def test_split_is_torchs_adamw_on_float32_weights_to_the_last_bit(options):
    split = Run(gradient(1000), "split", **options)
    p = torch.nn.Parameter(gradient(1000).float())
    opt = torch.optim.AdamW([p], betas=(0.85, 0.97), eps=1e-6, weight_decay=0.07, **options)
    for t in range(50):
        lr = 1e-4 * (1 + t % 7)
        split.take([gradient(t)], [1.0], lr)
        opt.param_groups[0]["lr"], p.grad = lr, gradient(t).float()
        opt.step()
    assert torch.equal(split.weight(), p.detach())
    assert torch.equal(split.states[0], opt.state[p]["exp_avg"])
    assert split.step.item() == 50
    assert not torch.equal(split.p.float(), p)


def test_where_nearest_stalls_the_others_follow_float32():
    n, alpha = 20_000, [0.6, 0.55]
    start = gradient(1000, n)
    runs = {name: Run(start, name) for name in ROUNDINGS}
    exact = Run(start.float())
    for t in range(100):
        for run in (*runs.values(), exact):
            grads = [gradient(t, n) + 0.3, gradient(2 * t, n)]
            run.take([g.to(run.p.dtype) for g in grads], alpha, 2e-5)
    way = exact.p - start.float()
    behind = {n: float((run.weight() - exact.p) @ way / (way @ way)) for n, run in runs.items()}
    error = {n: float((run.weight() - exact.p).norm() / way.norm()) for n, run in runs.items()}
    assert behind["nearest"] < -0.5  # most of the way is lost
    assert abs(behind["stochastic"]) < 0.06  # right on average, noisy in every element
    assert error["split"] == 0.0


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"`rounding` must be one of \('nearest', .* got 'up'"):
        check_rounding("up")
    with pytest.raises(ValueError, match=r"'split' has no derivative, so `differentiable` must be"):
        check_rounding("split", differentiable=True)
    with pytest.raises(ValueError, match=r"got 'kahan', which is gone: .*; use rounding='split'"):
        check_rounding("kahan")
    with pytest.raises(TypeError, match=r"`seed` must be an integer, got 1.5; use int\(seed\)"):
        check_seed(1.5)
    for numbers in ((-1,), (0, -2), (0, 0, 5, 4)):
        with pytest.raises(ValueError, match=r"a `Place` must have .* got Place\(tensor=.*share"):
            Place(*numbers)
    assert [check_rounding(name) for name in ROUNDINGS] == list(ROUNDINGS)
    assert check_rounding("nearest", differentiable=True) == "nearest"
