"""The plain-torch backend against float64 arithmetic written another way."""

import math

import pytest
import torch
from torch import Tensor

from raco_fast.backends import reference
from raco_fast.backends.types import AdamWOptions, Update

SHAPES = [(3,), (17, 5), (1,), (0, 4), (300_001,), (2, 3, 4), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_gradients(m: int, dtype: torch.dtype, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for i in range(m):
        scale = 3.0**-i
        draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
        lists.append([(scale * g + 0.1).to(dtype) for g in draw])
    return lists


def rows(grads: list[list[Tensor]], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.stack([torch.cat([g.to(dtype).flatten() for g in one]) for one in grads])


def relative_error(M: Tensor, truth: Tensor) -> float:
    norms = truth.diagonal().sqrt()
    return float(((M.double() - truth).abs() / torch.outer(norms, norms)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_gram_is_at_most_twice_as_far_from_float64_as_plain_torch(m, dtype):
    grads = random_gradients(m, dtype)
    G = rows(grads)
    truth = G @ G.T
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = rows(grads, wide)
    plain_error = relative_error(plain @ plain.T, truth)
    M = reference.gram(grads)
    assert M.dtype == torch.float64
    assert M.shape == (m, m)
    assert torch.equal(M, M.T)
    # A float64 matmul is the truth itself, so float64 is held to a few of its own roundings.
    floor = 1e-14 if dtype == torch.float64 else 2.0**-24
    assert relative_error(M, truth) <= 2 * max(plain_error, floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_rounds_products_and_nothing_else(dtype):
    """Whatever a BLAS library makes of a long float32 sum on this machine."""
    grads = random_gradients(3, dtype)
    G = rows(grads, torch.float64 if dtype == torch.float64 else torch.float32)
    truth = [[math.fsum((a * b).tolist()) for b in G] for a in G]
    found = reference.gram(grads)
    assert relative_error(found, torch.tensor(truth, dtype=torch.float64)) <= 1e-14


def test_gram_of_mixed_dtypes_in_one_model():
    grads = [
        [a, b]
        for a, b in zip(
            random_gradients(2, torch.bfloat16)[0][:2],
            random_gradients(2, torch.float32, seed=1)[0][:2],
            strict=True,
        )
    ]
    grads = [[grads[0][0], grads[0][1]], [grads[0][0] * 2, grads[0][1] - 1]]
    G = rows(grads)
    torch.testing.assert_close(reference.gram(grads), G @ G.T, rtol=1e-6, atol=0)


def test_sum_over_tensors_is_float64():
    # In float32 the ones would vanish beside 2^24.
    grads = [[torch.tensor([4096.0]), *[torch.ones(1)] * 999]]
    assert reference.gram(grads).item() == 2.0**24 + 999


def test_sum_over_blocks_is_float64(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK", 1)
    grads = [[torch.cat([torch.tensor([4096.0]), torch.ones(999)])]]
    assert reference.gram(grads).item() == 2.0**24 + 999


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_block_size_changes_only_rounding(monkeypatch, block):
    grads = [one[:3] for one in random_gradients(3, torch.float32)]
    G = rows(grads)
    monkeypatch.setattr(reference, "_BLOCK", block)
    torch.testing.assert_close(reference.gram(grads), G @ G.T, rtol=1e-6, atol=1e-6)


def test_missing_gradients_count_as_zeros():
    grads = random_gradients(3, torch.float32)
    missing = [(0, 1), (1, 1), (2, 4), (0, 6), (1, 6), (2, 6)]
    zeroed = [list(one) for one in grads]
    absent: list[list[Tensor | None]] = [list(one) for one in grads]
    for i, k in missing:
        zeroed[i][k] = torch.zeros_like(zeroed[i][k])
        absent[i][k] = None
    assert torch.equal(reference.gram(absent), reference.gram(zeroed))


def test_gram_of_nothing_is_zero():
    assert torch.equal(reference.gram([[], []]), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(reference.gram([[None], [None]]), torch.zeros(2, 2, dtype=torch.float64))


def test_complex_gradients_are_pairs_of_reals():
    a = torch.tensor([1 + 2j, 3 - 1j])
    b = torch.tensor([0.5 - 1j, 2j])
    expected = torch.tensor([[15.0, -3.5], [-3.5, 5.25]], dtype=torch.float64)
    assert torch.equal(reference.gram([[a], [b]]), expected)
    assert torch.equal(reference.gram([[a.conj()], [b.conj()]]), expected)


def test_equal_inputs_give_equal_bits():
    grads = random_gradients(4, torch.float32)
    assert torch.equal(reference.gram(grads), reference.gram(grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, with_threads):
    grads = random_gradients(3, dtype)
    alone, *others = [with_threads(n, lambda: reference.gram(grads)) for n in (1, 2, 3)]
    assert all(torch.equal(M, alone) for M in others)


def test_a_device_without_float64_sums_blocks_in_float32(monkeypatch):
    grads = random_gradients(2, torch.float32)
    G = rows(grads)
    monkeypatch.setattr(reference, "_WITHOUT_FLOAT64", ("cpu",))
    M = reference.gram(grads)
    assert M.dtype == torch.float64
    assert 0 < relative_error(M, G @ G.T) <= 1e-6


def test_memory_layout_does_not_matter():
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2))
    plain = reference.gram([[a], [b]])
    strided = reference.gram([[a.t().contiguous().t()], [b]])
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_show_in_the_gram(bad):
    grads = random_gradients(2, torch.float32)
    grads[1][4][123] = bad
    M = reference.gram(grads)
    assert torch.isfinite(M[0, 0])
    assert not torch.isfinite(M[1, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_rounds_once(dtype):
    grads = random_gradients(3, dtype)
    alpha = torch.tensor([0.3, 0.55, 1.25], dtype=torch.float64)
    out = [torch.full_like(g, torch.nan) for g in grads[0]]
    reference.combine(grads, alpha, out)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for k, result in enumerate(out):
        column = torch.stack([one[k] for one in grads])
        truth = torch.einsum("i...,i->...", column.double(), alpha)
        plain = torch.einsum("i...,i->...", column.to(wide), alpha.to(wide)).to(dtype)
        error, plain_error = [(x.double() - truth).abs().sum() for x in (result, plain)]
        assert error <= 2 * plain_error + 1e-15 * truth.abs().sum()


def test_combine_may_overwrite_a_gradient_and_fills_missing_with_zeros():
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    missing = torch.full((2,), torch.nan)
    alpha = torch.tensor([2.0, 4.0], dtype=torch.float64)
    reference.combine([[a, None], [b, None]], alpha, [b, missing])
    assert b.tolist() == [4.0, 12.0]
    assert a.tolist() == [1.0, -2.0]
    assert missing.tolist() == [0.0, 0.0]


def test_buckets_do_not_change_a_bit_of_the_update(monkeypatch):
    def run(bucket_bytes: int) -> list[Tensor]:
        monkeypatch.setattr(reference, "_BUCKET_BYTES", bucket_bytes)
        params = [g.clone() for g in random_gradients(1, torch.float32, seed=3)[0]]
        grads = random_gradients(2, torch.float32)
        state = [[torch.zeros_like(p) for p in params] for _ in range(3)]
        steps = [torch.tensor(4.0) for _ in params]
        options = AdamWOptions(0.01, 0.8, 0.95, 1e-7, 0.05, amsgrad=True, foreach=False)
        alpha = torch.tensor([0.7, 0.6], dtype=torch.float64)
        reference.combine_adamw(Update(params, grads, *state, steps, options), alpha)
        assert all(step.item() == 5.0 for step in steps)
        return [*params, *state[0], *state[1], *state[2]]

    whole, pieces = run(1 << 40), run(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_hyper_parameters_that_are_not_given_are_those_of_adamw():
    group = torch.optim.AdamW([torch.ones(1)]).param_groups[0]
    assert AdamWOptions.of(group) == AdamWOptions()
    group = torch.optim.AdamW([torch.ones(1)], 0.5, (0.7, 0.8), 1e-3, 0.3, True).param_groups[0]
    assert AdamWOptions.of(group) == AdamWOptions(0.5, 0.7, 0.8, 1e-3, 0.3, amsgrad=True)
