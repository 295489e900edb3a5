"""The comparison with plain torch that every device has to pass finds wrong kernels."""

from __future__ import annotations

import pytest
import torch

from raco_fast import proof, triton_backend


def test_the_kernels_pass(device):
    before = torch.get_rng_state()
    assert proof.disagreement(device) is None
    assert torch.equal(torch.get_rng_state(), before)


def wrong_gram(grads):
    return gram(grads) * (1 + 1e-4)


def wrong_combine(grads, coefficients, out):
    combine(grads, coefficients, out)
    out[1][-1] = 0.0


def wrong_combine_adamw(params, grads, coefficients, exp_avgs, exp_avg_sqs, *rest, **options):
    combine_adamw(params, grads, coefficients, exp_avgs, exp_avg_sqs, *rest, **options)
    exp_avg_sqs[2][1030] *= 1.2


def raising(*args, **kwargs):
    raise RuntimeError("no C compiler")


gram, combine, combine_adamw = (
    triton_backend.gram,
    triton_backend.combine,
    triton_backend.combine_adamw,
)


@pytest.mark.parametrize(
    ("operation", "wrong", "finding"),
    [
        ("gram", wrong_gram, "`gram` of torch.float32 tensors differs from plain torch"),
        ("combine", wrong_combine, "`combine` of torch.float32 tensors differs"),
        ("combine_adamw", wrong_combine_adamw, "`combine_adamw` of torch.float32 tensors differs"),
        ("combine", raising, "torch.float32 failed with RuntimeError: no C compiler"),
    ],
)
def test_a_wrong_kernel_is_named(operation, wrong, finding, device, monkeypatch):
    monkeypatch.setattr(triton_backend, operation, wrong)
    found = proof.disagreement(device)
    assert found is not None
    assert finding in found


def test_nan_is_a_disagreement(device):
    broken = torch.tensor([torch.nan, 1.0], device=device)
    assert not proof._agree([broken], [torch.ones(2, device=device)], 0.1)
