"""The update kernel against float64 AdamW and torch's AdamW."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from raco_fast import ClippedCAGradAdamW
from raco_fast.backends import choose, cuda, reference
from raco_fast.backends.types import AdamWOptions, Call

# The interpreter computes in numpy, which warns of inf - inf and 1 / 0; devices do not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def from_the_formula(
    problem: Any, dtype: torch.dtype, maximize: bool = False
) -> list[list[Tensor]]:
    """Parameters and states after one step of AdamW in `dtype`."""
    o = vars(problem.OPTIONS)
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
    kernel.step(cuda, **options)
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
def test_one_step(m, grad, param, state, make_problem):
    assert_accurate(lambda: make_problem(m, grad, param, state))


def test_maximize(make_problem):
    assert_accurate(lambda: make_problem(2, fp32, fp32, fp32), maximize=True)


def test_tensor_hyper_parameters(make_problem):
    options = {"lr": torch.tensor(0.013), "beta1": torch.tensor(0.85, dtype=torch.float64)}
    kernel, plain = [make_problem(2, fp32, fp32, fp32) for _ in range(2)]
    kernel.step(cuda, **options)
    plain.step(cuda)
    for a, b in zip(kernel.state(), plain.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_missing_gradients_misaligned_views_and_mixed_dtypes(make_problem):
    def make() -> Any:
        sizes = [(700,), (1030,), (9,), (33,), (5, 40)]
        problem = make_problem(3, bf16, bf16, fp32, sizes)
        narrow = make_problem(3, fp32, fp32, fp32, sizes, seed=1)
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


def test_nothing_to_do(make_problem):
    make_problem(2, fp32, fp32, fp32, []).step(cuda)
    make_problem(2, fp32, fp32, fp32, [(0, 3)]).step(cuda)


def test_expanded_parameters_are_refused(make_problem, device):
    problem = make_problem(1, fp32, fp32, fp32, [(6,)])
    problem.params[0] = torch.ones(1, device=device).expand(6)
    with pytest.raises(ValueError, match="number 0 must fill one stretch of memory"):
        problem.step(cuda)


@pytest.mark.parametrize("max_grad_norm", [0.05, None])
def test_many_steps_equal_adamw_on_g0(max_grad_norm, device, as_on_cuda):
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
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 15) for o in (opt, adamw)]
    active = 0
    with choose.backend("triton"):
        for _ in range(12):
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
        assert opt.state[p]["step"] == 12
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                opt.state[p][name], adamw.state[q][name], rtol=1e-5, atol=1e-8
            )


def test_a_non_finite_gradient_leaves_the_optimizer_untouched(device, as_on_cuda):
    p = torch.nn.Parameter(torch.randn(600, generator=torch.Generator().manual_seed(0)).to(device))
    opt = ClippedCAGradAdamW([p], weights=[0.4, 0.6], lr=0.1, weight_decay=0.1)
    with choose.backend("triton"):
        opt.backward([p.square().sum(), (p - 1).square().sum()])
        opt.step()
        before = [p.detach().clone(), *[v.clone() for v in opt.state[p].values()]]
        opt.zero_grad()
        opt.backward([(p * torch.inf).sum(), (p - 1).square().sum()])
        opt.step()
    assert opt.skipped_steps == 1
    for a, b in zip(before, [p.detach(), *opt.state[p].values()], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("alpha", [(torch.nan, 0.5), (0.5, -torch.inf)])
@pytest.mark.parametrize("rounding", ["nearest", "split"])
def test_a_step_whose_numbers_are_not_finite_writes_nothing(alpha, rounding, make_problem, device):
    problem = make_problem(2, bf16, bf16, fp32, [(530,), (3,)])
    problem.grads[0][0][7] = torch.nan
    residuals = None
    if rounding == "split":
        residuals = [torch.full(p.shape, 77, dtype=torch.int16, device=device)
                     for p in problem.params]  # fmt: skip
    before = [t.clone() for t in [*problem.state(), *(residuals or [])]]
    problem.launch(rounding, residuals, torch.tensor(alpha))
    for a, b in zip(before, [*problem.state(), *(residuals or [])], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capturable", [False, True])
def test_step_counts_stay_where_coefficients_that_are_not_finite_skip(capturable, make_problem):
    problem = make_problem(2, fp32, fp32, fp32, [(530,), (3,)])
    before = [t.clone() for t in problem.state()]
    nan = torch.tensor([0.5, torch.nan], device=problem.params[0].device)
    problem.steps = [s.to(nan.device) for s in problem.steps]
    if capturable:
        problem.step(cuda, nan, capturable=True)
        assert [s.item() for s in problem.steps] == [6.0, 7.0]
        assert all(torch.equal(a, b) for a, b in zip(before, problem.state(), strict=True))
    problem.step(cuda, problem.alpha.to(nan.device), capturable=capturable)
    assert [s.item() for s in problem.steps] == [7.0, 8.0]
    assert not torch.equal(before[0], problem.params[0])


def test_what_the_kernels_do_not_take(device, as_on_cuda):
    tensor = torch.ones(3, device=device)
    call = Call("combine_adamw", 32, (), [[tensor, None, tensor.bfloat16()]], AdamWOptions())
    assert cuda.obstacle(call, True) is None
    for m, tensors, options, reason in [
        (33, [tensor], {}, "at most 32 objectives, got 33"),
        (2, [tensor], {"amsgrad": True}, "amsgrad=True"),
        (2, [tensor], {"differentiable": True}, "differentiable=True"),
        (2, [tensor.double()], {}, "got torch.float64"),
        (2, [torch._neg_view(tensor)], {}, "resolve_neg"),
        (2, [tensor.as_subclass(type("Mine", (Tensor,), {}))], {}, "plain tensors, got a Mine"),
    ]:
        call = Call("combine_adamw", m, (), [tensors], AdamWOptions(**options))
        assert reason in str(cuda.obstacle(call, True))
    if INTERPRETED:  # where a tensor of any device passes for one of the kernels' own
        mixed = Call("gram", 2, (), [[tensor], [torch.ones(3, device="meta")]])
        assert "tensors of one device" in str(cuda.obstacle(mixed, True))
    recorded = Call("combine", 2, [[tensor.clone().requires_grad_()]], [[tensor]])
    assert cuda.obstacle(recorded, True) == "autograd would record it (use torch.no_grad())"
    assert cuda.obstacle(Call("gram", 2, (), [[None], [None]]), False) == "there are no tensors"
