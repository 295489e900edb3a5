"""The update kernels against float64 AdamW, torch's AdamW, and plain versions of every rounding."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast import ClippedCAGradAdamW, ops, reference, triton_backend
from raco_fast.kernels import combine_adamw as kernels
from raco_fast.kernels import tables

# The interpreter computes in numpy, which warns of inf - inf and 1 / 0; devices do not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = [(1,), (0, 4), (511,), (3, 3), (1025,), (), (8,), (4099,)]
OPTIONS: dict[str, Any] = {
    "lr": 0.013,
    "beta1": 0.85,
    "beta2": 0.97,
    "eps": 1e-6,
    "weight_decay": 0.07,
    "amsgrad": False,
    "maximize": False,
    "foreach": False,
    "capturable": False,
    "differentiable": False,
    "fused": False,
}
ALPHA = (0.6, 0.55, -0.25, 0.4, 1.2, 0.3, 0.8, 0.05)
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


class Problem:
    """Parameters, gradients and AdamW states in the middle of a run."""

    def __init__(self, m, grad, param, state, device, sizes=SIZES, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(scale: float, dtype: torch.dtype) -> list[Tensor]:
            values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
            return [(scale * v).to(device, dtype) for v in values]

        self.params = draw(0.3, param)
        self.grads: list[list[Tensor | None]] = [draw(0.1, grad) for _ in range(m)]
        self.exp_avgs = draw(0.05, state)
        self.exp_avg_sqs = [v.abs() for v in draw(0.01, state)]
        self.steps = [torch.tensor(6.0 + k) for k in range(len(sizes))]
        self.alpha = torch.tensor(ALPHA[:m], dtype=torch.float64)

    def state(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]

    def step(self, backend, **options) -> None:
        backend.combine_adamw(
            self.params,
            self.grads,
            self.alpha,
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            **{**OPTIONS, **options},
        )

    def launch(self, rounding="nearest", residuals=None, alpha=None, seed=0, **scalars) -> None:
        device = self.params[0].device
        for step in self.steps:
            step += 1

        def one(value: float) -> Tensor:
            return torch.tensor([value], device=device)

        kernels.combine_adamw(
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            triton_backend.hyper_rows(self.steps, OPTIONS).to(device),
            kernels.Scalars(
                alpha=(self.alpha if alpha is None else alpha).float().to(device),
                clip=one(scalars.get("clip", 1.0)),
                grad_scale=one(scalars.get("grad_scale", 1.0)),
                found_inf=one(scalars.get("found_inf", 0.0)),
                seed=torch.tensor([seed], device=device),
            ),
            rounding,
            residuals,
        )


def from_the_formula(
    problem: Problem, dtype: torch.dtype, maximize: bool = False
) -> list[list[Tensor]]:
    """Parameters and states after one step of AdamW in `dtype`."""
    o = OPTIONS
    wide = [[t.to(dtype) for t in ts] for ts in (problem.params, problem.exp_avgs)]
    after: list[list[Tensor]] = [[], [], []]
    for k, (w, m) in enumerate(zip(*wide, strict=True)):
        v, t = problem.exp_avg_sqs[k].to(dtype), problem.steps[k].item() + 1
        g = torch.zeros_like(w)
        for a, one in zip(problem.alpha.tolist(), problem.grads, strict=True):
            if one[k] is not None:
                g += (-a if maximize else a) * one[k].to(dtype)
        m = o["beta1"] * m + (1 - o["beta1"]) * g
        v = o["beta2"] * v + (1 - o["beta2"]) * g * g
        root = (v / (1 - o["beta2"] ** t)).sqrt() + o["eps"]
        w = w * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * m / (1 - o["beta1"] ** t) / root
        for values, value in zip(after, (w, m, v), strict=True):
            values.append(value)
    return after


def assert_accurate(make, **options) -> None:
    """One step is at most twice as far from float64 as the same step in plain torch.

    Plain torch is torch's AdamW, or, where it refuses to mix dtypes, the formula in float32.
    """
    kernel, plain = make(), make()
    maximize = options.get("maximize", False)
    truth = from_the_formula(kernel, torch.float64, maximize)
    kernel.step(triton_backend, **options)
    dtypes = {t.dtype for t in plain.state()}
    if len(dtypes) == 1:
        plain.step(reference, **options)
        rival = [plain.params, plain.exp_avgs, plain.exp_avg_sqs]
        assert [s.item() for s in kernel.steps] == [s.item() for s in plain.steps]
    else:
        rival = from_the_formula(plain, torch.float32, maximize)
    found = [kernel.params, kernel.exp_avgs, kernel.exp_avg_sqs]
    for ours, theirs, exact in zip(found, rival, truth, strict=True):
        size = sum(float(y.abs().sum()) for y in exact)
        theirs = [x.to(y.dtype) for x, y in zip(theirs, ours, strict=True)]
        error, plain_error = [
            sum(float((x.double() - y).abs().sum()) for x, y in zip(xs, exact, strict=True))
            for xs in (ours, theirs)
        ]
        assert error <= 2 * max(plain_error, 1e-8 * size)


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    """Equal bits in the interpreter; two kernels on a device may contract products differently."""
    for a, b in zip(left, right, strict=True):
        if INTERPRETED:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("m", "grad", "param", "state"),
    [
        (1, fp32, fp32, fp32),
        (2, bf16, bf16, fp32),
        (2, bf16, bf16, bf16),
        (3, bf16, fp32, fp32),
        (3, fp16, fp16, fp32),
        (8, fp32, fp32, bf16),
        *[
            pytest.param(m, *dtypes, marks=pytest.mark.slow)
            for m in range(1, 9)
            for dtypes in [(bf16, bf16, fp32), (fp32, fp32, fp32), (fp16, fp16, fp16)]
        ],
    ],
)
def test_one_step(m, grad, param, state, device):
    assert_accurate(lambda: Problem(m, grad, param, state, device))


def test_maximize(device):
    assert_accurate(lambda: Problem(2, fp32, fp32, fp32, device), maximize=True)


def test_tensor_hyper_parameters(device):
    options = {"lr": torch.tensor(0.013), "beta1": torch.tensor(0.85, dtype=torch.float64)}
    kernel, plain = [Problem(2, fp32, fp32, fp32, device) for _ in range(2)]
    kernel.step(triton_backend, **options)
    plain.step(triton_backend)
    for a, b in zip(kernel.state(), plain.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_missing_gradients_misaligned_views_and_mixed_dtypes(device):
    def make() -> Problem:
        sizes = [(700,), (1030,), (9,), (33,), (5, 40)]
        problem = Problem(3, bf16, bf16, fp32, device, sizes)
        narrow = Problem(3, fp32, fp32, fp32, device, sizes, seed=1)
        for i, k in [(0, 0), (1, 0), (2, 3), (0, 2)]:
            problem.grads[i][k] = None
        for lists in (problem.params, problem.exp_avgs, problem.exp_avg_sqs, *problem.grads):
            lists[1] = lists[1][5:] if lists is problem.params else lists[1][:-5]
        problem.params[3] = narrow.params[3]
        for i in (0, 1):
            problem.grads[i][3] = narrow.grads[i][3]
        transposed = problem.grads[1][4].t().contiguous().t()
        assert transposed.stride() != problem.grads[0][4].stride()
        problem.grads[1][4] = transposed
        assert problem.params[1].data_ptr() % 16 != 0
        return problem

    assert_accurate(make)


def test_nothing_to_do(device):
    Problem(2, fp32, fp32, fp32, device, []).step(triton_backend)
    Problem(2, fp32, fp32, fp32, device, [(0, 3)]).step(triton_backend)


def test_expanded_parameters_are_refused(device):
    problem = Problem(1, fp32, fp32, fp32, device, [(6,)])
    problem.params[0] = torch.ones(1, device=device).expand(6)
    with pytest.raises(ValueError, match="number 0 must fill one stretch of memory"):
        problem.step(triton_backend)


@pytest.mark.parametrize("max_grad_norm", [0.05, None])
def test_many_steps_equal_adamw_on_g0(max_grad_norm, device, monkeypatch):
    monkeypatch.setitem(ops._BUILT, "cpu", triton_backend)  # the interpreter's tensors are there
    shapes = [(20, 13), (1,)]
    generator = torch.Generator().manual_seed(3)

    def parameters() -> list[torch.nn.Parameter]:
        draws = torch.Generator().manual_seed(4)
        start = [torch.randn(s, generator=draws).to(device) for s in shapes]
        return [torch.nn.Parameter(p) for p in start]

    ours, theirs = parameters(), parameters()
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.98), "weight_decay": 0.1}
    opt = ClippedCAGradAdamW(
        ours, **settings, weights=[0.3, 0.7], c=0.6, max_grad_norm=max_grad_norm
    )
    adamw = torch.optim.AdamW(theirs, **settings)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 30) for o in (opt, adamw)]
    active = 0
    with ops.backend("cpu" if INTERPRETED else "triton"):
        for _ in range(24):
            draws = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(2)]
            grads = [[g.to(device) - 0.3 * i for g in one] for i, one in enumerate(draws)]
            opt.backward(
                [sum((g * p).sum() for g, p in zip(one, ours, strict=True)) for one in grads]
            )
            opt.step()
            opt.zero_grad()
            assert opt.solution is not None
            alpha = opt.solution.coefficients
            active += bool(opt.solution.clip_active)
            for p, *column in zip(theirs, *grads, strict=True):
                p.grad = sum(float(a) * g for a, g in zip(alpha, column, strict=True))
            if max_grad_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
                assert norm > max_grad_norm
            adamw.step()
            for schedule in schedules:
                schedule.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert opt.state[p]["step"] == 24
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                opt.state[p][name], adamw.state[q][name], rtol=1e-5, atol=1e-8
            )


def test_a_non_finite_gradient_leaves_the_optimizer_untouched(device, monkeypatch):
    monkeypatch.setitem(ops._BUILT, "cpu", triton_backend)
    p = torch.nn.Parameter(torch.randn(600, generator=torch.Generator().manual_seed(0)).to(device))
    opt = ClippedCAGradAdamW([p], weights=[0.4, 0.6], lr=0.1, weight_decay=0.1)
    with ops.backend("cpu" if INTERPRETED else "triton"):
        opt.backward([p.square().sum(), (p - 1).square().sum()])
        opt.step()
        before = [p.detach().clone(), *[v.clone() for v in opt.state[p].values()]]
        opt.zero_grad()
        opt.backward([(p * torch.inf).sum(), (p - 1).square().sum()])
        opt.step()
    assert opt.skipped_steps == 1
    for a, b in zip(before, [p.detach(), *opt.state[p].values()], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "skip",
    [
        {"found_inf": 1.0},
        {"alpha": torch.tensor([torch.nan, 0.5])},
        {"alpha": torch.tensor([0.5, -torch.inf])},
        {"clip": float("nan")},
        {"grad_scale": 0.0},
    ],
)
@pytest.mark.parametrize("rounding", ["nearest", "split"])
def test_a_step_whose_numbers_are_not_finite_writes_nothing(skip, rounding, device):
    problem = Problem(2, bf16, bf16, fp32, device, [(530,), (3,)])
    problem.grads[0][0][7] = torch.nan
    residuals = None
    if rounding == "split":
        residuals = [torch.full(p.shape, 77, dtype=torch.int16, device=device)
                     for p in problem.params]  # fmt: skip
    before = [t.clone() for t in [*problem.state(), *(residuals or [])]]
    problem.launch(rounding, residuals, **skip)
    for a, b in zip(before, [*problem.state(), *(residuals or [])], strict=True):
        assert torch.equal(a, b)


def test_clip_factor_and_grad_scale_scale_the_gradient(device):
    factors, folded = [Problem(2, fp32, fp32, fp32, device, [(530,)]) for _ in range(2)]
    factors.launch(clip=0.25, grad_scale=8.0)
    folded.launch(alpha=folded.alpha / 32)
    assert_same(factors.state(), folded.state())


def hashed(element: np.ndarray, seed: int, tensor: int) -> np.ndarray:
    """The kernel's 16 random bits, in numpy."""

    def mix(x: Any, shifts: tuple[int, int, int], factors: tuple[int, int], key: Any = 0) -> Any:
        x = (x ^ (x >> shifts[0])) * factors[0] % 2**32
        x = ((x ^ (x >> shifts[1])) + key) * factors[1] % 2**32
        return x ^ (x >> shifts[2])

    def make_key(x: int) -> int:
        x = (x ^ tensor * 0x9E3779B1) % 2**32
        return int(mix(x, (16, 15, 15), (0x21F0AAAD, 0x735A2D97)))

    first = make_key(seed)
    x = element.astype(object) ^ first
    return (mix(x, (16, 15, 16), (0x7FEB352D, 0x846CA68B), make_key(first)) & 0xFFFF).astype(int)


def rounded(w: Tensor, noise: np.ndarray) -> Tensor:
    bits = w.view(torch.int32) + torch.from_numpy(noise).to(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def fp32_twin(problem: Problem) -> Problem:
    """The same problem with float32 parameters."""
    problem.params = [p.float() for p in problem.params]
    return problem


def test_stochastic_rounding_adds_the_hashed_bits(device):
    make = lambda: Problem(2, bf16, bf16, fp32, device, [(530,), (9,)])  # noqa: E731
    stochastic, exact = make(), fp32_twin(make())
    stochastic.launch("stochastic", seed=12345)
    exact.launch()
    for k, (p, w) in enumerate(zip(stochastic.params, exact.params, strict=True)):
        expected = rounded(w.cpu(), hashed(np.arange(w.numel()), 12345, k))
        agreement = (p.cpu() == expected).double().mean()
        assert agreement == 1.0 if INTERPRETED else agreement > 0.999
    assert_same(stochastic.exp_avgs, exact.exp_avgs)


def test_stochastic_rounding_depends_on_neither_grid_nor_chunks_nor_alignment(device, monkeypatch):
    def run(shift: int, seed: int = 5) -> list[Tensor]:
        problem = Problem(2, bf16, bf16, fp32, device, [(9000 + shift,), (9,)])
        plain = Problem(2, bf16, bf16, fp32, device, [(9000,), (9,)])
        for mine, model in zip(problem.grads, plain.grads, strict=True):
            mine[:] = model
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            target, source = getattr(problem, name), getattr(plain, name)
            target[0] = target[0][shift:].copy_(source[0])
            target[1] = source[1]
        problem.launch("stochastic", seed=seed)
        return problem.params

    first = run(0)
    monkeypatch.setattr(tables, "_CHUNKS", ((1 << 24, 1024),))
    monkeypatch.setitem(kernels.PROGRAMS, "stochastic", 3)
    for again in (run(0), run(1)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], run(0, seed=6)[0])


def test_stochastic_rounding_is_unbiased():
    # Over 10,000 seeds at one element, and over 10,000 elements at one seed.
    of_seeds = np.array([hashed(np.array([77]), seed, 3)[0] for seed in range(10_000)])
    for bits in (of_seeds, hashed(np.arange(10_000), 99, 3)):
        assert abs(bits.mean() / 65535 - 0.5) < 4 * 12**-0.5 / 100
        counts = np.bincount(bits >> 10, minlength=64)
        assert ((counts - 156.25) ** 2 / 156.25).sum() < 63 + 4 * 126**0.5
        centred = bits - bits.mean()
        assert abs((centred[1:] * centred[:-1]).mean() / centred.var()) < 0.04
    other = hashed(np.arange(10_000), 99, 4)
    assert abs(np.corrcoef(other, hashed(np.arange(10_000), 99, 3))[0, 1]) < 0.04


@pytest.mark.parametrize("rounding", ["stochastic", "split"])
def test_rounding_in_integers_does_not_lose_nan(rounding, device):
    problem = Problem(1, bf16, bf16, fp32, device, [(64,)])
    problem.exp_avgs[0].view(torch.int32)[2] = 0x7FFFFFFF  # NaN as devices write it
    residuals = [torch.zeros(64, dtype=torch.int16, device=device)] if rounding == "split" else None
    for _ in range(2):
        problem.launch(rounding, residuals, seed=1)
        assert problem.params[0].isnan().nonzero().flatten().tolist() == [2]


def master(p: Tensor, residual: Tensor) -> Tensor:
    return ((p.view(torch.int16).int() << 16) + residual.int()).view(torch.float32)


def test_split_master_is_the_float32_run(device):
    make = lambda: Problem(2, bf16, bf16, fp32, device, [(137,)])  # noqa: E731
    split, exact = make(), fp32_twin(make())
    residuals = [torch.zeros_like(p, dtype=torch.int16) for p in split.params]
    for seed in range(20):
        fresh = Problem(2, bf16, bf16, fp32, device, [(137,)], seed=seed).grads
        split.grads = exact.grads = fresh
        split.launch("split", residuals)
        exact.launch()
    masters = [master(p, r) for p, r in zip(split.params, residuals, strict=True)]
    assert_same(masters, exact.params)
    for p, w in zip(split.params, exact.params, strict=True):
        torch.testing.assert_close(p.float(), w, rtol=2.0**-8, atol=0)


def test_split_master_survives_every_residual(device):
    # A step of size zero must give back weight and residual, also at the ends of int16.
    edge = torch.tensor([-32768, -32767, -1, 0, 1, 32766, 32767], dtype=torch.int16)
    weights = torch.tensor([1.0, -1.0, 0.5, -3.0e-5, 2.0**30, 1.0078125])
    problem = Problem(1, bf16, bf16, fp32, device, [(42,)])
    problem.params = [weights.repeat_interleave(7).to(device, bf16)]
    residuals = [edge.repeat(6).to(device)]
    before = [problem.params[0].clone(), residuals[0].clone()]
    saved, OPTIONS["lr"] = OPTIONS["lr"], 0.0
    try:
        problem.launch("split", residuals)
    finally:
        OPTIONS["lr"] = saved
    assert torch.equal(problem.params[0], before[0])
    assert torch.equal(residuals[0], before[1])


def test_kahan_follows_the_float32_run_where_nearest_stalls(device):
    make = lambda: Problem(2, bf16, bf16, fp32, device, [(130,)])  # noqa: E731
    saved, OPTIONS["lr"] = OPTIONS["lr"], 2e-5
    try:
        runs = {name: make() for name in ("nearest", "kahan", "exact")}
        fp32_twin(runs["exact"])
        start = runs["exact"].params[0].clone()
        residuals = [torch.zeros_like(p) for p in runs["kahan"].params]
        for _ in range(20):
            runs["nearest"].launch()
            runs["kahan"].launch("kahan", residuals)
            runs["exact"].launch()
    finally:
        OPTIONS["lr"] = saved
    exact = runs["exact"].params[0]
    moved = (exact - start).abs().sum()
    compensated = runs["kahan"].params[0].float() + residuals[0].float()
    assert (compensated - exact).abs().sum() < 0.02 * moved
    assert (runs["nearest"].params[0].float() - exact).abs().sum() > 0.3 * moved


def test_roundings_that_do_not_fit_are_refused(device):
    problem = Problem(1, fp32, fp32, fp32, device, [(4,)])
    with pytest.raises(ValueError, match=r"`rounding` must be one of .*, got 'up'"):
        problem.launch("up")
    with pytest.raises(ValueError, match=r"'split' is for bfloat16 parameters, got torch.float32"):
        problem.launch("split")
    problem = Problem(1, bf16, bf16, fp32, device, [(4,)])
    with pytest.raises(ValueError, match=r"must be n tensors of torch.int16 for .*'split'"):
        problem.launch("split")
    with pytest.raises(ValueError, match=r"must be None for `rounding`='nearest'"):
        problem.launch("nearest", [torch.zeros(4, dtype=torch.int16)])
    with pytest.raises(ValueError, match=r"\[0\] must be torch.bfloat16 for .*got torch.int16"):
        problem.launch("kahan", [torch.zeros(4, dtype=torch.int16)])


@pytest.mark.parametrize(
    ("m", "dtype", "out_dtype"),
    [(1, bf16, bf16), (2, bf16, fp32), (3, fp32, fp32), (8, fp16, fp16)],
)
def test_combine(m, dtype, out_dtype, device):
    problem = Problem(m, dtype, dtype, fp32, device)
    problem.grads[0][4] = None if m > 1 else problem.grads[0][4]
    out = [torch.empty_like(p, dtype=out_dtype) for p in problem.params]
    plain = [torch.empty_like(o) for o in out]
    triton_backend.combine(problem.grads, problem.alpha, out)
    reference.combine(problem.grads, problem.alpha, plain)
    truth = [
        sum(a * g.double() for a, g in zip(problem.alpha.tolist(), column, strict=True)
            if g is not None)
        for column in zip(*problem.grads, strict=True)
    ]  # fmt: skip
    error, plain_error = [
        sum(float((x.double() - y).abs().sum()) for x, y in zip(xs, truth, strict=True))
        for xs in (out, plain)
    ]
    assert error <= 2 * plain_error


def test_combine_may_overwrite_a_gradient_and_fills_missing_with_zeros(device):
    a = torch.randn(1030, generator=torch.Generator().manual_seed(1)).to(device)
    b = torch.randn(1030, generator=torch.Generator().manual_seed(2)).to(device)
    missing = torch.full((2,), torch.nan, device=device)
    expected, kept = 2 * a + 4 * b, a.clone()
    alpha = torch.tensor([2.0, 4.0], dtype=torch.float64)
    misaligned = b[1:]
    triton_backend.combine([[a[1:], None], [misaligned, None]], alpha, [misaligned, missing])
    assert torch.equal(b[1:], expected[1:])
    assert torch.equal(a, kept)
    assert missing.tolist() == [0.0, 0.0]


def test_what_the_kernels_do_not_take(device):
    tensor = torch.ones(3, device=device)
    assert triton_backend.unsupported(32, [tensor, None, tensor.bfloat16()]) is None
    for m, tensors, options, reason in [
        (33, [tensor], {}, "at most 32 objectives, got 33"),
        (2, [tensor], {"amsgrad": True}, "amsgrad=True"),
        (2, [tensor], {"differentiable": True}, "differentiable=True"),
        (2, [tensor.double()], {}, "got torch.float64"),
        (2, [tensor, torch.ones(1, device="meta")], {}, "one device"),
        (2, [torch._neg_view(tensor)], {}, "resolve_neg"),
    ]:
        found = triton_backend.unsupported(m, tensors, **options)
        assert found is not None
        assert reason in found
