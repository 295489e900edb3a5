"""The Triton kernels compile for CUDA devices as their headers promise. No device is needed.

What the interpreter cannot see is read off the machine code: registers, spills, the width of every
access in the main loop, 64-bit offsets. The constants are those that the launchers use.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from machine_code import Machine, assert_no_float_atomics, assert_no_spills, compiled, width

from raco_fast.kernels import columns, combine, combine_adamw, gram, gram_in_metric, tables

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

REGISTERS_PER_MULTIPROCESSOR = 65536
ARCHITECTURES = (80, 90, 100)
POINTERS = {
    "partials": "*fp32",
    "turned": "*fp32",
    "numbers": "*fp32",
    "total": "*fp64",
    "hyper": "*fp32",
    "alpha": "*fp32",
    "clip": "*fp32",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
    "seed": "*i64",
}
TABLES = ("addresses", "numels", "ids", "chunks")
bf16, fp16, fp32, int16 = torch.bfloat16, torch.float16, torch.float32, torch.int16


OPTIONS = {"num_warps": columns.NUM_WARPS, "enable_fp_fusion": True}


def compile_kernel(
    kernel: Any,
    constants: dict[str, object],
    architecture: int,
    options: dict[str, object],
    pointers: dict[str, str] | None = None,
) -> Machine:
    pointers = {**POINTERS, **(pointers or {})}
    types = {
        name: "i32" if name in ("n_chunks", "n_partials") else pointers.get(name, "*i64")
        for name in kernel.arg_names
    }
    tables = [name for name in TABLES if name in types]
    return compiled(kernel, types, constants, tables, architecture, options)


def accesses(body: tuple[str, ...], kind: str) -> list[int]:
    return sorted(width(op) for op in body if op.startswith(kind))


def table(dtypes: list[torch.dtype], m: int, *, aligned: bool = True, missing: bool = False):
    columns: list[list[torch.Tensor | None]] = [[torch.zeros(64, dtype=d)] for d in dtypes]
    if not aligned:
        columns = [[t[1:] for t in column if t is not None] for column in columns]
    if missing:
        columns[0] = [None]
    (found,) = tables.build(columns, m, torch.device("cpu"))
    assert (found.aligned, found.missing) == (aligned, missing)
    return found


@cache
def compiled_gram(m: int, dtype: torch.dtype, architecture: int, **kind: bool) -> Machine:
    of_m = table([dtype] * m, m, **kind)
    constants = gram.partials_constants(m, of_m)
    options = gram.partials_options(m, architecture, of_m.missing)
    return compile_kernel(gram.gram_partials, constants, architecture, options)


@cache
def compiled_step(
    m: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    rounding: str,
    architecture: int,
    rows: bool = False,
    **kind: bool,
) -> Machine:
    grad, param, state = dtypes
    residual = [int16] if rounding == "split" else []
    columns = [*[grad] * m, param, state, state, *residual]
    constants = combine_adamw.step_constants(m, table(columns, m, **kind), rounding, rows)
    return compile_kernel(combine_adamw.combine_adamw_step, constants, architecture, OPTIONS)


@cache
def compiled_out(
    m: int, dtypes: tuple[torch.dtype, torch.dtype], architecture: int, **kind: bool
) -> Machine:
    columns = [*[dtypes[0]] * m, dtypes[1]]
    constants = combine.out_constants(m, table(columns, m, **kind))
    return compile_kernel(combine.combine_out, constants, architecture, OPTIONS)


def resident(registers: int) -> int:
    """Programs of 128 threads that fit a multiprocessor; registers come in units of 8."""
    return min(16, REGISTERS_PER_MULTIPROCESSOR // (128 * (-(-registers // 8) * 8)))


def assert_deterministic_and_64_bit(code: Machine) -> None:
    assert_no_float_atomics(code)
    # The start of a chunk is added to the pointer as int64, beyond 2^31 elements too.
    assert re.search(r"tt\.addptr %\w+, %start\w* : !tt\.ptr<\w+>, i64", code.ttir)


def assert_main_loop(code: Machine, loads: list[int], stores: list[int]) -> None:
    """Whole multiples of the expected accesses, and none besides."""
    assert code.loops
    for body in code.loops:
        for kind, expected in (("LDG", loads), ("STG", stores)):
            found = accesses(body, kind)
            times = len(found) // max(len(expected), 1)
            assert found == sorted(expected * times), (kind, found)
            assert times >= 1 or not expected
        assert not [op for op in body if op.startswith(("LDS", "STS", "SHFL", "BAR"))]


def per_thread(*dtypes: torch.dtype) -> list[int]:
    """Bytes that a thread moves of each tensor, 16 of the widest."""
    widest = max(d.itemsize for d in dtypes)
    return [16 * d.itemsize // widest for d in dtypes]


def slow_unless(fast: bool) -> Any:
    return () if fast else pytest.mark.slow


GRAMS = [
    pytest.param(
        m, d, a, marks=slow_unless((a == 90 and d == bf16) or (m == 2 and d == bf16))
    )
    for m in range(1, 9)
    for d in (bf16, fp16, fp32)
    for a in ARCHITECTURES
]  # fmt: skip


@pytest.mark.parametrize(("m", "dtype", "architecture"), GRAMS)
def test_gram(m, dtype, architecture):
    code = compiled_gram(m, dtype, architecture)
    assert_no_spills(code)
    assert_deterministic_and_64_bit(code)
    assert_main_loop(code, [16] * m, [])
    assert resident(code.registers) >= gram.resident_programs(m, architecture, missing=False)


@pytest.mark.parametrize(
    ("m", "dtypes", "architecture", "missing"),
    [
        pytest.param(
            *(m, dtypes, a, missing),
            marks=slow_unless((m, a, missing, dtypes) == (2, 90, False, (bf16, fp32))),
        )
        for m in range(1, gram_in_metric.MAX_UNROLLED + 1)
        for dtypes in [(bf16, fp32), (fp32, fp32), (bf16, bf16)]
        for a in ARCHITECTURES
        for missing in ((False, True) if m > 1 else (False,))
    ],
)
def test_gram_in_metric(m, dtypes, architecture, missing):
    gradient, moment = dtypes
    of_m = table([*[gradient] * m, moment], m, missing=missing)
    constants = gram_in_metric.partials_constants(m, of_m)
    kernel, options = gram_in_metric.metric_partials, gram_in_metric.partials_options(m)
    code = compile_kernel(kernel, constants, architecture, options)
    assert_no_spills(code)
    assert_deterministic_and_64_bit(code)
    assert_main_loop(code, per_thread(*[gradient] * m, moment), [])
    assert resident(code.registers) >= gram_in_metric.PROGRAMS[m]


STEPS = [
    ((bf16, bf16, fp32), "nearest"),
    ((bf16, bf16, fp32), "stochastic"),
    ((bf16, bf16, fp32), "split"),
    ((bf16, bf16, bf16), "nearest"),
    ((bf16, bf16, bf16), "stochastic"),
    ((bf16, bf16, bf16), "split"),
    ((bf16, fp32, fp32), "nearest"),
    ((fp32, fp32, fp32), "nearest"),
    ((fp16, fp16, fp32), "nearest"),
    ((fp16, fp16, fp16), "nearest"),
    ((fp32, fp32, bf16), "nearest"),
]
UPDATES = [
    pytest.param(
        m, dtypes, rounding, a, marks=slow_unless(m == 2 and a == 90 and fp16 not in dtypes)
    )
    for m in (1, 2, 3, 4, 5, 6, 7, 8)
    for dtypes, rounding in STEPS
    for a in ARCHITECTURES
]  # fmt: skip


@pytest.mark.parametrize(("m", "dtypes", "rounding", "architecture"), UPDATES)
def test_combine_adamw(m, dtypes, rounding, architecture):
    code = compiled_step(m, dtypes, rounding, architecture)
    assert_no_spills(code)
    assert_deterministic_and_64_bit(code)
    grad, param, state = dtypes
    residual = [param] if rounding == "split" else []
    widths = per_thread(*[grad] * m, param, state, state, *residual)
    assert_main_loop(code, widths, widths[m:])
    assert resident(code.registers) >= combine_adamw.resident_programs(rounding, architecture)


@pytest.mark.parametrize(
    ("m", "state", "architecture"),
    [
        pytest.param(m, state, a, marks=slow_unless(m == 2 and a == 90))
        for m in (1, 2, 3, 4, 5, 6, 7, 8)
        for state in (bf16, fp32)
        for a in ARCHITECTURES
    ],
)
def test_combine_adamw_in_rows(m, state, architecture):
    code = compiled_step(m, (bf16, bf16, state), "stochastic", architecture, rows=True)
    assert_no_spills(code)
    assert_deterministic_and_64_bit(code)
    widths = per_thread(*[bf16] * m, bf16, state, state)
    assert_main_loop(code, widths, widths[m:])
    programs = combine_adamw.resident_programs("stochastic", architecture, rows=True)
    assert resident(code.registers) >= programs


@pytest.mark.parametrize(
    ("m", "dtypes", "architecture"),
    [
        pytest.param(m, dtypes, a, marks=slow_unless(m == 2 and a == 90 and dtypes[0] == bf16))
        for m in (1, 2, 3, 8)
        for dtypes in [(bf16, bf16), (fp16, fp16), (fp32, fp32), (bf16, fp32)]
        for a in ARCHITECTURES
    ],
)
def test_combine(m, dtypes, architecture):
    code = compiled_out(m, dtypes, architecture)
    assert_no_spills(code)
    assert_deterministic_and_64_bit(code)
    widths = per_thread(*[dtypes[0]] * m, dtypes[1])
    assert_main_loop(code, widths[:m], widths[m:])
    assert resident(code.registers) >= combine.PROGRAMS


SPECIAL = [
    pytest.param(m, d, a, marks=slow_unless(m == 2 and a == 90 and d == bf16))
    for m in range(2, 9)
    for d in (bf16, fp32)
    for a in ARCHITECTURES
]


@pytest.mark.parametrize(("m", "dtype", "architecture"), SPECIAL)
def test_missing_gradients_do_not_narrow_the_loads(m, dtype, architecture):
    code = compiled_gram(m, dtype, architecture, missing=True)
    assert_no_spills(code)
    assert_main_loop(code, [16] * m, [])
    assert resident(code.registers) >= gram.resident_programs(m, architecture, missing=True)
    code = compiled_step(m, (dtype, dtype, fp32), "nearest", architecture, missing=True)
    assert_no_spills(code)
    widths = per_thread(*[dtype] * m, dtype, fp32, fp32)
    assert_main_loop(code, widths, widths[m:])
    assert resident(code.registers) >= combine_adamw.resident_programs("nearest", architecture)


@pytest.mark.parametrize("missing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("m", "dtype", "architecture"), SPECIAL)
def test_misaligned_tensors_are_read_element_by_element(m, dtype, architecture, missing):
    # A wider access would fault on the device.
    kind = {"aligned": False, "missing": missing}
    gram_code = compiled_gram(m, dtype, architecture, **kind)
    assert resident(gram_code.registers) >= gram.resident_programs(m, architecture, missing)
    # For sums over warps alone: laid out anew, they would be written by several threads each.
    assert gram_code.shared_bytes <= 4 * gram.NUM_WARPS
    step_code = compiled_step(m, (dtype, dtype, dtype), "nearest", architecture, **kind)
    for code in (gram_code, step_code):
        assert_no_spills(code)
        assert not re.search(r"(ld|st)\.global[.\w]*\.v[24]\.b(16|32)", code.ptx)
        assert re.search(rf"ld\.global[.\w]*\.b{8 * dtype.itemsize}", code.ptx)


@pytest.mark.parametrize("m", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", [90, *[pytest.param(a, marks=pytest.mark.slow)
                                                for a in (80, 100)]])  # fmt: skip
def test_final_sum(m, architecture):
    code = compile_kernel(gram.gram_total, {"M": m, "BLOCK": 128}, architecture, OPTIONS)
    assert_no_spills(code)
    assert "add.f64" in re.sub(r"add\.rn\.f64", "add.f64", code.ptx)
    assert_no_float_atomics(code)
