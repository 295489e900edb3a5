"""The weight-gradient kernel compiles for CUDA devices as its header promises. No device is needed.

Tilings and constants are those of the launcher; what is read off the machine code is what the
interpreter cannot see: tensor cores, spills, shared memory, widths of accesses.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from machine_code import Machine, assert_no_float_atomics, assert_no_spills, compiled

from raco_fast.kernels import weight_grad
from raco_fast.kernels.weight_grad_plan import tiling

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
POINTERS = {bf16: "*bf16", fp16: "*fp16", fp32: "*fp32"}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# What a program may have; consumer cards, which get the tilings of sm_80, have the least.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@cache
def compiled_tiles(
    m: int,
    architecture: int,
    dtype: torch.dtype = bf16,
    out: torch.dtype = bf16,
    accumulate: bool = False,
    products: bool = True,
    *,
    aligned: bool = True,
) -> Machine:
    tile = asdict(tiling(m, architecture, out == fp32))
    options = {"num_warps": tile.pop("num_warps")}
    types = {
        "x": POINTERS[dtype],
        "dy": POINTERS[dtype],
        "blocks": "*i64",
        "n_blocks": "i32",
        "coefficients": "*fp32",
        "n_segments": "i32",
        "outs": (POINTERS[out],) * m,
        "d_out": "i32",
        "d_in": "i32",
        "partials": "*fp32",
    }
    constants = {**weight_grad.constants(m, accumulate, products), **tile}
    divisible = ["blocks", "coefficients"]
    if products:
        divisible.append("partials")
    else:
        constants["partials"] = None
    divisible += ["x", "dy", "d_out", "d_in", "outs"] if aligned else []
    return compiled(
        weight_grad.weight_grad_tiles, types, constants, divisible, architecture, options
    )


def case(m, architecture, dtype, out, accumulate, products) -> Any:
    usual = m == 2 and dtype == bf16 and out == bf16 and not accumulate and architecture != 120
    widest = (m, architecture, out, accumulate) == (2, 90, bf16, True)
    marks = () if products and (usual or widest) else pytest.mark.slow
    return pytest.param(m, architecture, dtype, out, accumulate, products, marks=marks)


KINDS = [(bf16, bf16, False), (bf16, bf16, True), (bf16, fp32, False),
         (bf16, fp32, True), (fp16, fp16, False)]  # fmt: skip
CASES = [
    case(m, architecture, *kind, products)
    for m in range(1, 9)
    for architecture in TENSOR_CORES
    for kind in KINDS
    for products in (True, False)
    if architecture != 120 or kind == (bf16, bf16, False)
]


@pytest.mark.parametrize(("m", "architecture", "dtype", "out", "accumulate", "products"), CASES)
def test_tiles(m, architecture, dtype, out, accumulate, products):
    code = compiled_tiles(m, architecture, dtype, out, accumulate, products)
    if products and m > 2 and OLD_TRITON:
        assert code.local_bytes <= 16  # a few registers of the epilogue
    else:
        assert_no_spills(code)
    assert_no_float_atomics(code)
    assert TENSOR_CORES[architecture] in code.ptx
    assert code.shared_bytes <= SHARED_BYTES[architecture]
    # Both operands come by asynchronous copies of 16 bytes, several k-blocks ahead.
    tile = tiling(m, architecture, out == fp32)
    copies = len(re.findall(r"cp\.async\.cg\.shared\.global.*, 0x10,", code.ptx))
    per_block = tile.BLOCK_K * (tile.BLOCK_M + tile.BLOCK_N) * 2 // (16 * 32 * tile.num_warps)
    assert copies >= 3 * per_block
    assert accumulate or not re.search(r"ld\.global[.\w]*\.v4", code.ptx)


def test_offsets_are_64_bits_wide():
    # Tokens times features, or d_out times d_in, may be beyond 2^31.
    ttir = compiled_tiles(2, 90).ttir
    products = re.findall(r"arith\.muli .* : tensor<\w+x(i\d+)>", ttir)
    assert products == ["i64"] * 3  # rows of dY, of X and of the gradients


@pytest.mark.parametrize(
    "architecture", [90, *[pytest.param(a, marks=pytest.mark.slow) for a in (80, 100)]]
)
def test_rows_of_any_length_are_read_element_by_element(architecture):
    # A wider access would fault on the device, where a row is no multiple of 16 bytes.
    code = compiled_tiles(2, architecture, aligned=False)
    assert "cp.async.cg" not in code.ptx
    assert not re.search(r"(ld|st)\.global[.\w]*\.v[248]\.b(16|32)", code.ptx)
    assert re.search(r"ld\.global[.\w]*\.b16", code.ptx)
