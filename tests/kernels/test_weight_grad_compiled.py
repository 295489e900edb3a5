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

from machine_code import Machine, assert_no_float_atomics, assert_no_spills, compiled

from raco_fast.kernels import gram, weight_grad
from raco_fast.kernels.weight_grad_arguments import FORMS
from raco_fast.kernels.weight_grad_plan import tiling

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = {bf16: "*bf16", fp16: "*fp16", fp32: "*fp32"}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# What a program may have; consumer cards, which get the tilings of sm_80, have the least.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@cache
def compiled_tiles(
    form: str,
    m: int,
    architecture: int,
    dtype: torch.dtype = bf16,
    out: torch.dtype | None = bf16,
    accumulate: bool = False,
    *,
    aligned: bool = True,
) -> Machine:
    tile = asdict(tiling(form, m, architecture, out == fp32))
    options = {"num_warps": tile.pop("num_warps")}
    types = {
        "x": POINTERS[dtype],
        "dy": POINTERS[dtype],
        "blocks": "*i64",
        "n_blocks": "i32",
        "weights": "*fp32",
        "n_columns": "i32",
        "outs": () if out is None else (POINTERS[out],) * m,
        "partials": "*fp32",
        "d_out": "i32",
        "d_in": "i32",
    }
    constants = {**weight_grad.constants(form, m, accumulate), **tile}
    divisible = ["blocks", "weights", "partials"]
    divisible += ["x", "dy", "d_out", "d_in"] if aligned else []
    if out is None:
        constants["outs"] = None
    elif aligned:
        divisible.append("outs")
    return compiled(
        weight_grad.weight_grad_tiles, types, constants, divisible, architecture, options
    )


def case(form, m, architecture, dtype, out, accumulate) -> Any:
    usual = m == 2 and dtype == bf16 and out == bf16 and not accumulate and architecture != 120
    widest = (form, m, architecture, out, accumulate) == ("running", 3, 90, bf16, True)
    marks = () if usual or widest else pytest.mark.slow
    return pytest.param(form, m, architecture, dtype, out, accumulate, marks=marks)


KINDS = [(bf16, None, False), (bf16, bf16, False), (bf16, bf16, True), (bf16, fp32, False),
         (bf16, fp32, True), (fp16, fp16, False)]  # fmt: skip
CASES = [
    case(form, m, architecture, *kind)
    for form in FORMS
    for m in range(1, 9)
    for architecture in TENSOR_CORES
    for kind in KINDS
    if architecture != 120 or kind == (bf16, bf16, False)
]


@pytest.mark.parametrize(("form", "m", "architecture", "dtype", "out", "accumulate"), CASES)
def test_tiles(form, m, architecture, dtype, out, accumulate):
    code = compiled_tiles(form, m, architecture, dtype, out, accumulate)
    assert_no_spills(code)
    assert_no_float_atomics(code)
    assert TENSOR_CORES[architecture] in code.ptx
    assert code.shared_bytes <= SHARED_BYTES[architecture]
    # Both operands come by asynchronous copies of 16 bytes, several k-blocks ahead.
    tile = tiling(form, m, architecture, out == fp32)
    copies = len(re.findall(r"cp\.async\.cg\.shared\.global.*, 0x10,", code.ptx))
    per_block = tile.BLOCK_K * (tile.BLOCK_M + tile.BLOCK_N) * 2 // (16 * 32 * tile.num_warps)
    assert copies >= 3 * per_block
    assert accumulate or not re.search(r"ld\.global[.\w]*\.v4", code.ptx)


@pytest.mark.parametrize("form", FORMS)
def test_offsets_are_64_bits_wide(form):
    # Tokens times features, or d_out times d_in, may be beyond 2^31.
    ttir = compiled_tiles(form, 2, 90).ttir
    products = re.findall(r"arith\.muli .* : tensor<\w+x(i\d+)>", ttir)
    assert products == ["i64"] * 3  # rows of dY, of X and of the gradients


@pytest.mark.parametrize(
    ("form", "architecture"),
    [
        ("direct", 90),
        *[pytest.param("direct", a, marks=pytest.mark.slow) for a in (80, 100)],
        *[pytest.param("running", a, marks=pytest.mark.slow) for a in (80, 90, 100)],
    ],
)
def test_rows_of_any_length_are_read_element_by_element(form, architecture):
    # A wider access would fault on the device, where a row is no multiple of 16 bytes.
    code = compiled_tiles(form, 2, architecture, aligned=False)
    assert "cp.async.cg" not in code.ptx
    assert not re.search(r"(ld|st)\.global[.\w]*\.v[248]\.b(16|32)", code.ptx)
    assert re.search(r"ld\.global[.\w]*\.b16", code.ptx)


@pytest.mark.parametrize("m", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", [90, *[pytest.param(a, marks=pytest.mark.slow)
                                                for a in (80, 100)]])  # fmt: skip
def test_final_sum(m, architecture):
    total = dict(weight_grad.TOTAL)
    options = {"num_warps": total.pop("num_warps")}
    types = {"partials": "*fp32", "n_partials": "i32", "total": "*fp64"}
    code = compiled(gram.gram_total, types, {"M": m, **total}, ["partials"], architecture, options)
    assert_no_spills(code)
    assert_no_float_atomics(code)
