"""The weight-gradient kernel against float64, and against float32 row scaling for its errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from raco_fast.kernels import weight_grad as kernels
from raco_fast.kernels.weight_grad import store_weight_grad, weight_grad
from raco_fast.kernels.weight_grad_blocks import running_ratios

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = (33, 0, 1, 20, 32, 0, 7)  # around the 32 rows of a k-block of the interpreter's tiling
D_OUT, D_IN = 72, 136  # no multiples of a tile, several tiles
FORMS = ["direct", "running"]


class Layer:
    """Inputs and output gradients of a Linear layer, in segments; coefficients of m objectives.

    `dy` is that of a backward pass seeded with ones, or with A_0 for the form "running"; the truth
    is computed in float64 from the rounded `x` and `dy` that the kernel gets.
    """

    def __init__(
        self, m, device, dtype=fp16, lengths=LENGTHS, d_out=D_OUT, d_in=D_IN, form="direct"
    ):
        self.draw = torch.Generator().manual_seed(m)
        S, T = len(lengths), sum(lengths)
        bounds = [sum(lengths[:n]) for n in range(S + 1)]
        A = self.normal(m, S)
        A[0] += 0.1 * A[0].sign()
        if form == "running":
            found = running_ratios(A)
            assert found is not None
            A = found
        self.m, self.form, self.segments = m, form, bounds
        self.coefficients = A.float()
        self.x = self.normal(T, d_in).to(device, dtype)
        self.dy = self.normal(T, d_out).to(device, dtype)
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64)

    def out(self, dtype=fp32) -> list[Tensor]:
        shape = (self.dy.shape[1], self.x.shape[1])
        return [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(self.m)]

    def run(self, out=None, accumulate=False, **changed) -> Tensor:
        given = {"form": self.form, "coefficients": self.coefficients, **changed}
        coefficients = given.pop("coefficients")
        return weight_grad(self.x, self.dy, self.segments, coefficients, out, accumulate, **given)

    def exact(self, dtype=torch.float64) -> list[Tensor]:
        """G_i by scaling rows, in `dtype`."""
        lengths = torch.tensor([b - a for a, b in pairwise(self.segments)])
        of_row = self.coefficients.to(dtype).repeat_interleave(lengths, dim=1)
        x, dy = self.x.cpu().to(dtype), self.dy.cpu().to(dtype)
        return [(row[:, None] * dy).T @ x for row in of_row]


def gram_of(tensors: list[Tensor], dtype=torch.float64) -> Tensor:
    rows = torch.stack([t.cpu().to(dtype).flatten() for t in tensors])
    return rows @ rows.T


def assert_close(found: list[Tensor], truth: list[Tensor], plain: list[Tensor]) -> None:
    """At most twice as far from the truth as plain torch, in the norm of each gradient."""
    for f, t, p in zip(found, truth, plain, strict=True):
        error, plain_error = [float((g.cpu().double() - t).norm() / t.norm()) for g in (f, p)]
        assert error <= 2 * max(plain_error, 2.0**-24)


def assert_gram(M: Tensor, of: list[Tensor]) -> None:
    """M is the Gram matrix of these tensors, to float32 sums."""
    truth, plain = gram_of(of), gram_of(of, fp32)
    norms = truth.diagonal().sqrt()
    error, plain_error = [
        float(((g.cpu().double() - truth).abs() / torch.outer(norms, norms)).max())
        for g in (M, plain)
    ]
    assert M.dtype == torch.float64
    assert torch.equal(M, M.T)
    assert error <= 2 * max(plain_error, 2.0**-24)


FAST = [
    (1, fp16, fp32),
    (2, bf16, bf16),
    (2, fp16, fp32),
    (3, bf16, fp32),
    (4, fp16, fp16),
    (8, bf16, fp32),
]
CASES = [
    pytest.param(
        form, m, dtype, out, marks=() if (m, dtype, out) in FAST else pytest.mark.slow
    )
    for form in FORMS
    for m in range(1, 9)
    for dtype in (bf16, fp16)
    for out in (dtype, fp32)
]  # fmt: skip


@pytest.mark.parametrize(("form", "m", "dtype", "out_dtype"), CASES)
def test_gradients_and_their_gram(form, m, dtype, out_dtype, device):
    layer = Layer(m, device, dtype, form=form)
    out = layer.out(out_dtype)
    M = layer.run(out)
    plain = [g.to(out_dtype) for g in layer.exact(fp32)]
    assert_close(out, layer.exact(), plain)
    assert_gram(M, out)


@pytest.mark.parametrize(("form", "m", "dtype", "out_dtype"), CASES)
def test_accumulating(form, m, dtype, out_dtype, device):
    layer = Layer(m, device, dtype, form=form)
    out = [(3 * layer.normal(*g.shape)).to(device, out_dtype) for g in layer.out()]
    before = [g.cpu().clone() for g in out]
    M = layer.run(out, accumulate=True)
    truth = [b.double() + g for b, g in zip(before, layer.exact(), strict=True)]
    plain = [(b.float() + g).to(out_dtype) for b, g in zip(before, layer.exact(fp32), strict=True)]
    assert_close(out, truth, plain)
    assert_gram(M, out)


@pytest.mark.parametrize("m", [1, 2, 3, *[pytest.param(m, marks=pytest.mark.slow) for m in (4, 8)]])
@pytest.mark.parametrize("form", FORMS)
def test_gram_alone_is_that_of_unrounded_gradients(form, m, device):
    layer = Layer(m, device, bf16, form=form)
    truth, plain = gram_of(layer.exact()), gram_of(layer.exact(fp32))
    assert_close([layer.run()], [truth], [plain])


@pytest.mark.parametrize(
    ("lengths", "d_out", "d_in"),
    [
        ((1,), 1, 1),
        ((64,), 128, 128),
        ((5, 5, 5), 7, 300),
        ((31, 33, 64, 65), 257, 31),
        ((2,) * 40, 17, 16),
        pytest.param((700, 3), 1100, 130, marks=pytest.mark.slow),  # tiles in more than one group
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_shapes(form, lengths, d_out, d_in, device):
    layer = Layer(2, device, lengths=lengths, d_out=d_out, d_in=d_in, form=form)
    out = layer.out()
    assert_gram(layer.run(out), out)
    assert_close(out, layer.exact(), layer.exact(fp32))


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_zeros(form, lengths, device):
    layer = Layer(3, device, lengths=lengths, form=form)
    out = layer.out()
    assert torch.equal(layer.run(out), torch.zeros(3, 3, dtype=torch.float64, device=device))
    assert not any(g.any() for g in out)


@pytest.mark.parametrize("form", FORMS)
def test_an_objective_without_weight_gets_zeros(form, device):
    layer = Layer(3, device, form=form)
    layer.coefficients[1] = 0
    layer.coefficients[2, ::2] = 0  # and one that lacks some sequences
    out = layer.out()
    M = layer.run(out)
    assert not out[1].any()
    assert not M[1].any()
    kept = [out[0], out[2]]
    truth, plain = [[g[0], g[2]] for g in (layer.exact(), layer.exact(fp32))]
    assert_close(kept, truth, plain)


@pytest.mark.parametrize(
    ("form", "m"),
    [("running", 9), *[pytest.param("direct", m, marks=pytest.mark.slow) for m in (9, 17)]],
)
def test_more_objectives_than_one_launch_takes(form, m, device):
    layer = Layer(m, device, lengths=(6, 9), d_out=20, d_in=12, form=form)
    out = layer.out()
    M = layer.run(out)
    assert_close(out, layer.exact(), layer.exact(fp32))
    assert_gram(M, out)


@pytest.mark.parametrize("m", [2, 9])
def test_the_gradients_without_their_gram(m, device, monkeypatch):
    layer = Layer(m, device, bf16, lengths=(6, 9), d_out=20, d_in=12)
    ours, theirs = layer.out(bf16), layer.out(bf16)
    layer.run(theirs)
    for name in ("gram", "gram_total"):
        monkeypatch.setattr(kernels, name, None)
    store_weight_grad(layer.x, layer.dy, layer.segments, layer.coefficients, ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match=f"`out` must be {m} tensors"):
        store_weight_grad(layer.x, layer.dy, layer.segments, layer.coefficients, ours[1:])


def test_coefficients_on_the_device_or_sent_there(device):
    layer = Layer(2, device)
    assert torch.equal(layer.run(), layer.run(coefficients=layer.coefficients.to(device)))


def test_both_forms_agree_on_seeded_rows(device):
    layer = Layer(3, device, form="running")
    running, direct = layer.out(), layer.out()
    before = kernels.running_blocks.cache_info()
    layer.run(running)
    after = kernels.running_blocks.cache_info()
    assert after.hits + after.misses == before.hits + before.misses + 1
    layer.run(direct, form="direct")
    assert kernels.running_blocks.cache_info() == after
    assert_close(running, [g.cpu().double() for g in direct], layer.exact(fp32))


@pytest.mark.parametrize("powers", [(1,), (3, -2), (7, -7, 0)])
def test_running_form_under_large_and_small_ratios(powers, device):
    # What grows with the ratio is the share of A_0 that is missing: the rows shrink by as much.
    layer = Layer(1 + len(powers), device, bf16, lengths=(9,) * 12, form="running")
    seeds = 10 ** torch.linspace(-6, 0, 12, dtype=torch.float64)[torch.randperm(
        12, generator=layer.draw)]  # fmt: skip
    A = torch.stack([seeds, *[10.0**p * layer.normal(12) for p in powers]])
    found = running_ratios(A)
    assert found is not None
    layer.coefficients = found
    layer.dy = (layer.dy.double() * seeds.repeat_interleave(9)[:, None].to(device)).to(bf16)
    out = layer.out()
    layer.run(out)
    assert_close(out, layer.exact(), layer.exact(fp32))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equal_inputs_give_equal_bits(form, accumulate, device):
    layer = Layer(3, device, bf16, form=form)
    start = [layer.normal(*g.shape).to(device, bf16) for g in layer.out()]
    results = []
    for _ in range(2):
        layer.x, layer.dy = layer.x.clone(), layer.dy.clone()
        out = [g.clone() for g in start]
        results.append([layer.run(out, accumulate), *out])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("form", FORMS)
def test_non_finite_gradients_show(form, device):
    layer = Layer(2, device, form=form)
    layer.dy[40, 3] = float("inf")
    M = layer.run()
    assert not torch.isfinite(M).any()


def test_rows_that_no_objective_seeds_are_for_the_direct_form(device):
    layer = Layer(2, device)
    layer.coefficients[0, 3] = 0
    assert running_ratios(layer.coefficients) is None
    with pytest.raises(ValueError, match=r"'running' must be ratios on the CPU .* form 'direct'"):
        layer.run(form="running")
    out = layer.out()
    layer.run(out)
    assert_close(out, layer.exact(), layer.exact(fp32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: {"x": it.x.float()}, "`x` and `dy` must be .* torch.float32 and torch.float16"),
        (lambda it: {"dy": it.dy.bfloat16()}, "`x` and `dy` must be bfloat16 or float16, got"),
        (lambda it: {"x": it.x[None]}, r"`x` must be \[1 tokens, features\] .* pass x.flatten"),
        (lambda it: {"dy": it.dy[1:]}, r"`dy` must be \[93 tokens, .* got shape \[92, 72\]"),
        (lambda it: {"dy": it.dy.t().contiguous().t()}, r"`dy` must be .* strides \(1, 93\)"),
        (lambda it: {"segments": [0, 33, 33, 34, 54, 86, 86, 92]}, "must rise from 0 to 93, .*92]"),
        (lambda it: {"segments": [0, 33, 32, 34, 54, 86, 86, 93]}, "must rise from 0 to 93"),
        (lambda it: {"segments": [1, 33, 33, 34, 54, 86, 86, 93]}, "make rows of no sequence"),
        (lambda it: {"coefficients": it.coefficients.double()}, "must be float32 .* torch.float64"),
        (lambda it: {"coefficients": it.coefficients[:, :6]}, r"float32 \[m, 7\], .*\[2, 6\]"),
        (lambda it: {"coefficients": it.coefficients.to("meta")}, "must be on .* or cpu, got meta"),
        (lambda it: {"form": "rows"}, r"`form` must be one of \('direct', 'running'\), got 'rows'"),
        (lambda it: {"form": "running"}, "first row of ones, got .* use running_ratios"),
        (lambda it: {"out": None, "accumulate": True}, "`out` must be given .* accumulate=True"),
        (lambda it: {"out": None, "coefficients": torch.ones(9, 7)}, "than 8 objectives.*m = 9"),
        (lambda it: {"out": it.out()[:1]}, "`out` must be 2 tensors, one per objective, got 1"),
        (lambda it: {"out": [it.out()[0], it.out(bf16)[0]]}, "number 1: torch.bfloat16"),
        (lambda it: {"out": it.out(torch.float64)}, "float16 or float32, got number 0"),
        (lambda it: {"out": [g.t() for g in it.out()]}, r"contiguous \[72, 136\] .* \[136, 72\]"),
        (lambda it: {"out": [g.t().contiguous().t() for g in it.out()]}, r"strides \(1, 72\)"),
    ],
)  # fmt: skip
def test_what_is_refused(change, message, device):
    layer = Layer(2, device)
    given = {
        "x": layer.x, "dy": layer.dy, "segments": layer.segments, "out": layer.out(),
        "coefficients": layer.coefficients, **change(layer),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        weight_grad(**given)
