"""The combine kernel against float64."""

import pytest
import torch

from raco_fast.backends import cuda, reference

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def test_fresh_memory_is_nan_here(device):
    assert torch.empty(1000, device=device).isnan().all()
    assert torch.empty_like(torch.ones(9, dtype=bf16, device=device)).isnan().all()


@pytest.mark.parametrize(
    ("m", "dtype", "out_dtype"),
    [(1, bf16, bf16), (2, bf16, fp32), (3, fp32, fp32), (8, fp16, fp16)],
)
def test_combine(m, dtype, out_dtype, make_problem):
    problem = make_problem(m, dtype, dtype, fp32)
    problem.grads[0][4] = None if m > 1 else problem.grads[0][4]
    out = [torch.empty_like(p, dtype=out_dtype) for p in problem.params]
    plain = [torch.empty_like(o) for o in out]
    cuda.combine(problem.grads, problem.alpha, out)
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
    cuda.combine([[a[1:], None], [misaligned, None]], alpha, [misaligned, missing])
    assert torch.equal(b[1:], expected[1:])
    assert torch.equal(a, kept)
    assert missing.tolist() == [0.0, 0.0]
