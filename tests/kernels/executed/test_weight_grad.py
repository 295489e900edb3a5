"""The weight-gradient kernel against float64, and against float32 row scaling for its errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from raco_fast.kernels.weight_grad import weight_grad

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = (33, 0, 1, 20, 32, 0, 7)  # around the 32 rows of a k-block of the interpreter's tiling
D_OUT, D_IN = 72, 136  # no multiples of a tile, several tiles


class Layer:
    """Inputs and output gradients of a Linear layer, in segments; coefficients of m objectives.

    The truth is computed in float64 from the rounded `x` and `dy` that the kernel gets.
    """

    def __init__(self, m, device, dtype=fp16, lengths=LENGTHS, d_out=D_OUT, d_in=D_IN):
        self.draw = torch.Generator().manual_seed(m)
        self.m, self.device = m, device
        self.segments = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        self.coefficients = self.normal(m, len(lengths)).float()
        self.x = self.normal(sum(lengths), d_in).to(device, dtype)
        self.dy = self.normal(sum(lengths), d_out).to(device, dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64)

    def out(self, dtype=fp32) -> list[Tensor]:
        shape = (self.dy.shape[1], self.x.shape[1])
        return [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(self.m)]

    def run(self, out: list[Tensor], accumulate=False) -> list[Tensor]:
        weight_grad(self.x, self.dy, self.segments, self.coefficients, out, accumulate)
        return out

    def exact(self, dtype=torch.float64) -> list[Tensor]:
        """G_i by scaling rows, in `dtype`."""
        lengths = torch.tensor([b - a for a, b in pairwise(self.segments)])
        of_row = self.coefficients.to(dtype).repeat_interleave(lengths, dim=1)
        x, dy = self.x.cpu().to(dtype), self.dy.cpu().to(dtype)
        return [(row[:, None] * dy).T @ x for row in of_row]


def assert_close(found: list[Tensor], truth: list[Tensor], plain: list[Tensor]) -> None:
    """At most twice as far from the truth as plain torch, in the norm of each gradient."""
    for f, t, p in zip(found, truth, plain, strict=True):
        error, plain_error = [float((g.cpu().double() - t).norm() / t.norm()) for g in (f, p)]
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
    pytest.param(m, dtype, out, marks=() if (m, dtype, out) in FAST else pytest.mark.slow)
    for m in range(1, 9)
    for dtype in (bf16, fp16)
    for out in (dtype, fp32)
]


@pytest.mark.parametrize(("m", "dtype", "out_dtype"), CASES)
def test_gradients(m, dtype, out_dtype, device):
    layer = Layer(m, device, dtype)
    out = layer.run(layer.out(out_dtype))
    assert_close(out, layer.exact(), [g.to(out_dtype) for g in layer.exact(fp32)])


@pytest.mark.parametrize(("m", "dtype", "out_dtype"), CASES)
def test_accumulating(m, dtype, out_dtype, device):
    layer = Layer(m, device, dtype)
    out = [(3 * layer.normal(*g.shape)).to(device, out_dtype) for g in layer.out()]
    before = [g.cpu().clone() for g in out]
    layer.run(out, accumulate=True)
    truth = [b.double() + g for b, g in zip(before, layer.exact(), strict=True)]
    plain = [(b.float() + g).to(out_dtype) for b, g in zip(before, layer.exact(fp32), strict=True)]
    assert_close(out, truth, plain)


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
def test_shapes(lengths, d_out, d_in, device):
    layer = Layer(2, device, lengths=lengths, d_out=d_out, d_in=d_in)
    assert_close(layer.run(layer.out()), layer.exact(), layer.exact(fp32))


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0)])
def test_no_rows_give_zeros(lengths, device):
    layer = Layer(3, device, lengths=lengths)
    assert not any(g.any() for g in layer.run(layer.out()))


def test_an_objective_without_weight_gets_zeros(device):
    layer = Layer(3, device)
    layer.coefficients[1] = 0
    layer.coefficients[2, ::2] = 0  # and one that lacks some sequences
    out = layer.run(layer.out())
    assert not out[1].any()
    truth, plain = [[g[0], g[2]] for g in (layer.exact(), layer.exact(fp32))]
    assert_close([out[0], out[2]], truth, plain)


@pytest.mark.parametrize("m", [9, pytest.param(17, marks=pytest.mark.slow)])
def test_more_objectives_than_one_launch_takes(m, device):
    layer = Layer(m, device, lengths=(6, 9), d_out=20, d_in=12)
    assert_close(layer.run(layer.out()), layer.exact(), layer.exact(fp32))


def test_coefficients_on_the_device_or_sent_there(device):
    layer = Layer(2, device)
    sent = layer.run(layer.out())
    layer.coefficients = layer.coefficients.to(device)
    assert all(torch.equal(a, b) for a, b in zip(sent, layer.run(layer.out()), strict=True))


@pytest.mark.parametrize("accumulate", [False, True])
def test_equal_inputs_give_equal_bits(accumulate, device):
    layer = Layer(3, device, bf16)
    start = [layer.normal(*g.shape).to(device, bf16) for g in layer.out()]
    results = []
    for _ in range(2):
        layer.x, layer.dy = layer.x.clone(), layer.dy.clone()
        results.append(layer.run([g.clone() for g in start], accumulate))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_non_finite_gradients_show(device):
    layer = Layer(2, device)
    layer.dy[40, 3] = float("inf")
    assert not any(g.isfinite().all() for g in layer.run(layer.out()))


PRODUCTS = [(2, bf16, bf16), (3, bf16, fp32)]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("m", "dtype", "out_dtype"),
    [
        *PRODUCTS,
        *(pytest.param(*c, marks=pytest.mark.slow) for c in FAST if c not in PRODUCTS),
    ],
)
def test_products_are_those_of_what_was_written(m, dtype, out_dtype, accumulate, device):
    """Of the rounded gradients, and nothing of the columns and rows that a tile has beyond them."""
    layer = Layer(m, device, dtype)
    out = [layer.normal(*g.shape).to(device, out_dtype) for g in layer.out()]
    products = weight_grad(
        layer.x, layer.dy, layer.segments, layer.coefficients, out, accumulate, products=True
    )
    assert products is not None
    assert products.dtype == torch.float64
    rows = torch.stack([g.cpu().double().flatten() for g in out])
    truth = rows @ rows.T
    norms = truth.diagonal().sqrt()
    assert ((products.cpu() - truth).abs() <= 4 * 2.0**-24 * torch.outer(norms, norms)).all()
    assert torch.equal(products, products.T)


def test_products_of_more_objectives_than_one_launch_takes_are_not_had(device):
    layer = Layer(9, device, lengths=(6, 9), d_out=20, d_in=12)
    arguments = layer.x, layer.dy, layer.segments, layer.coefficients
    assert weight_grad(*arguments, layer.out(), products=True) is None


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_change_no_gradient_and_repeat_to_the_bit(accumulate, device):
    layer = Layer(2, device, bf16)
    arguments = layer.x, layer.dy, layer.segments, layer.coefficients
    start = [layer.normal(*g.shape).to(device, bf16) for g in layer.out()]
    plain = layer.run([g.clone() for g in start], accumulate)
    taken = []
    for _ in range(2):
        out = [g.clone() for g in start]
        taken.append(weight_grad(*arguments, out, accumulate, products=True))
        assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    assert torch.equal(*taken)
