"""The comparison with plain torch that every device has to pass finds wrong kernels."""

from __future__ import annotations

import pytest
import torch

from raco_fast.backends import cuda, self_test


def test_the_kernels_pass(device):
    before = torch.get_rng_state()
    for part in ("step", "gram_in_metric", "weight_grad"):
        assert self_test.disagreement(cuda, part, device) is None
    assert torch.equal(torch.get_rng_state(), before)


def wrong_residuals(update, *rest):
    combine_adamw(update, *rest)
    if update.rounding.residuals:
        update.rounding.residuals[3][17] = 0.0


def wrong_weight_grad(x, dy, bounds, U, out, fresh, products):
    """A group of one row is left out."""
    return weight_grad(x, dy, bounds, U * torch.tensor([1.0, 1.0, 0.0, 1.0]), out, fresh, products)


def forgetful_weight_grad(x, dy, bounds, U, out, fresh, products):
    return weight_grad(x, dy, bounds, U, out, True, products)


def wrong_products(x, dy, bounds, U, out, fresh, products):
    """As if a tile beyond the last row or column counted."""
    return 1.001 * weight_grad(x, dy, bounds, U, out, fresh, products)


def no_products(x, dy, bounds, U, out, fresh, products):
    weight_grad(x, dy, bounds, U, out, fresh)


def wrong_gram(*call):
    return gram(*call) * (1 + 1e-4)


def wrong_combine(grads, coefficients, out):
    combine(grads, coefficients, out)
    out[1][-1] = 0.0


def wrong_combine_adamw(update, *rest):
    combine_adamw(update, *rest)
    update.exp_avg_sqs[2][1030] *= 1.2


def raising(*args, **kwargs):
    raise RuntimeError("no C compiler")


gram, combine, combine_adamw, weight_grad = (
    cuda.gram,
    cuda.combine,
    cuda.combine_adamw,
    cuda.weight_grad,
)


@pytest.mark.parametrize(
    ("operation", "wrong", "finding"),
    [
        ("gram", wrong_gram, "`gram` of torch.float32 tensors differs from plain torch"),
        ("combine", wrong_combine, "`combine` of torch.float32 tensors differs"),
        ("combine_adamw", wrong_combine_adamw, "`combine_adamw` of torch.float32 tensors differs"),
        ("combine_adamw", wrong_residuals, "`combine_adamw, split` of torch.bfloat16 tensors"),
        ("combine", raising, "torch.float32 failed with RuntimeError: no C compiler"),
    ],
)
def test_a_wrong_kernel_is_named(operation, wrong, finding, device, monkeypatch):
    monkeypatch.setattr(cuda, operation, wrong)
    found = self_test.disagreement(cuda, "step", device)
    assert found is not None
    assert finding in found


def test_a_wrong_kernel_of_the_metric_is_named_by_itself(device, monkeypatch):
    def wrong(grads, metric, built):
        return gram_in_metric(grads, metric, built) * torch.tensor([1.0, 1.0 + 1e-4])[:, None, None]

    gram_in_metric = cuda.gram_in_metric
    monkeypatch.setattr(cuda, "gram_in_metric", wrong)
    found = self_test.disagreement(cuda, "gram_in_metric", device)
    assert "`gram_in_metric` of torch.float32 tensors differs from plain torch" in str(found)


@pytest.mark.parametrize(
    ("wrong", "finding"),
    [
        (wrong_weight_grad, "`weight_grad` of torch.bfloat16 tensors differs from plain torch"),
        (forgetful_weight_grad, "`weight_grad` of torch.bfloat16 tensors differs"),
        (wrong_products, "`weight_grad, products` of torch.bfloat16 tensors differs"),
        (no_products, "`weight_grad, products` of torch.bfloat16 tensors differs"),
        (raising, "torch.bfloat16 failed with RuntimeError: no C compiler"),
    ],
)
def test_a_wrong_kernel_of_layers_is_named_by_itself(wrong, finding, device, monkeypatch):
    monkeypatch.setattr(cuda, "weight_grad", wrong)
    assert finding in str(self_test.disagreement(cuda, "weight_grad", device))


def test_nan_is_a_disagreement(device):
    broken = torch.tensor([torch.nan, 1.0], device=device)
    assert not self_test._agree([broken], [torch.ones(2, device=device)], 0.1)
