"""The Triton kernels compile for CUDA devices as their headers promise. No device is needed.

What the interpreter cannot see is read off the machine code: registers, spills, the width of every
access in the main loop, 64-bit offsets. The constants are those that the launchers use.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from raco_fast.kernels import combine_adamw, gram, tables

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS_PER_MULTIPROCESSOR = 65536
ARCHITECTURES = (80, 90, 100)
POINTERS = {
    "partials": "*fp32",
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


@dataclass(frozen=True)
class Machine:
    """What was found in the machine code of one kernel."""

    registers: int
    local_bytes: int
    ops: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]  # innermost loops that load more than one element at once
    ptx: str
    ttir: str


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def compiled(
    kernel: Any, constants: dict[str, object], architecture: int, options: dict[str, object]
) -> Machine:
    signature = {}
    for name in kernel.arg_names:
        scalar = "i32" if name in ("n_chunks", "n_partials") else "*i64"
        signature[name] = "constexpr" if name in constants else POINTERS.get(name, scalar)
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in TABLES
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", architecture, 32)
    return machine(triton.compile(source, target=target, options=options))


def machine(kernel: Any) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, sass = [
            subprocess.run(
                [BINARIES / "cuobjdump", option, file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        ]
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", resources)
    assert found is not None
    registers, stack, local = map(int, found.groups())
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", sass)
    ops = [(int(address, 16), op, rest) for address, op, rest in lines]
    return Machine(
        registers,
        stack + local,
        tuple(op for _, op, _ in ops),
        tuple(main_loops(ops)),
        kernel.asm["ptx"],
        kernel.asm["ttir"],
    )


def main_loops(ops: list[tuple[int, str, str]]) -> list[tuple[str, ...]]:
    """The innermost loops with vector loads (ptxas may unroll one and keep a rest loop)."""
    ranges = []
    for address, op, rest in ops:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if op.startswith("BRA") and target and int(target.group(1), 16) < address:
            start = int(target.group(1), 16)
            body = tuple(o for a, o, _ in ops if start <= a <= address)
            if any(o.startswith("LDG") and width(o) >= 8 for o in body):
                ranges.append((start, address, body))
    return [
        body
        for start, end, body in ranges
        if not any(s >= start and e <= end and (s, e) != (start, end) for s, e, _ in ranges)
    ]


def width(op: str) -> int:
    """Bytes per thread of a load or store instruction."""
    parts = op.split(".")
    for suffix, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1)):
        if suffix in parts:
            return size
    return 4


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
    constants, options = gram.partials_constants(m, of_m), gram.partials_options(m, of_m)
    return compiled(gram.gram_partials, constants, architecture, options)


@cache
def compiled_step(
    m: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    rounding: str,
    architecture: int,
    **kind: bool,
) -> Machine:
    grad, param, state = dtypes
    residual = {"split": [int16], "kahan": [param]}.get(rounding, [])
    columns = [*[grad] * m, param, state, state, *residual]
    constants = combine_adamw.step_constants(m, table(columns, m, **kind), rounding)
    return compiled(combine_adamw.combine_adamw_step, constants, architecture, OPTIONS)


@cache
def compiled_out(
    m: int, dtypes: tuple[torch.dtype, torch.dtype], architecture: int, **kind: bool
) -> Machine:
    columns = [*[dtypes[0]] * m, dtypes[1]]
    constants = combine_adamw.out_constants(m, table(columns, m, **kind))
    return compiled(combine_adamw.combine_out, constants, architecture, OPTIONS)


def resident(registers: int) -> int:
    """Programs of 128 threads that fit a multiprocessor; registers come in units of 8."""
    return min(16, REGISTERS_PER_MULTIPROCESSOR // (128 * (-(-registers // 8) * 8)))


def assert_no_spills(code: Machine) -> None:
    assert code.local_bytes == 0
    assert not [op for op in code.ops if op.startswith(("LDL", "STL"))]


def assert_deterministic_and_64_bit(code: Machine) -> None:
    assert not re.search(r"\b(red|atom)\.", code.ptx)
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
    assert code.registers <= gram.REGISTERS[m]
    assert resident(code.registers) >= gram.PROGRAMS[m]


STEPS = [
    ((bf16, bf16, fp32), "nearest"),
    ((bf16, bf16, fp32), "stochastic"),
    ((bf16, bf16, fp32), "split"),
    ((bf16, bf16, fp32), "kahan"),
    ((bf16, bf16, bf16), "nearest"),
    ((bf16, bf16, bf16), "stochastic"),
    ((bf16, bf16, bf16), "split"),
    ((bf16, bf16, bf16), "kahan"),
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
    residual = [param] if rounding in ("split", "kahan") else []
    widths = per_thread(*[grad] * m, param, state, state, *residual)
    assert_main_loop(code, widths, widths[m:])
    assert resident(code.registers) >= combine_adamw.PROGRAMS[rounding]


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
    assert resident(code.registers) >= combine_adamw.PROGRAMS["nearest"]


@pytest.mark.parametrize("m", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", [90, *[pytest.param(a, marks=pytest.mark.slow)
                                                for a in (80, 100)]])  # fmt: skip
def test_missing_gradients_do_not_narrow_the_loads(m, architecture):
    code = compiled_gram(m, bf16, architecture, missing=True)
    assert_no_spills(code)
    assert_main_loop(code, [16] * m, [])
    dtypes = (bf16, bf16, fp32)
    code = compiled_step(m, dtypes, "nearest", architecture, missing=True)
    assert_no_spills(code)
    widths = per_thread(*[bf16] * m, bf16, fp32, fp32)
    assert_main_loop(code, widths, widths[m:])


@pytest.mark.parametrize("m", [2, *[pytest.param(m, marks=pytest.mark.slow) for m in (1, 4, 8)]])
@pytest.mark.parametrize("architecture", [90, *[pytest.param(a, marks=pytest.mark.slow)
                                                for a in (80, 100)]])  # fmt: skip
def test_misaligned_tensors_are_read_element_by_element(m, architecture):
    # A wider access would fault on the device.
    gram_code = compiled_gram(m, bf16, architecture, aligned=False)
    step_code = compiled_step(m, (bf16, bf16, bf16), "nearest", architecture, aligned=False)
    for code in (gram_code, step_code):
        assert_no_spills(code)
        assert not re.search(r"(ld|st)\.global[.\w]*\.v[24]\.b(16|32)", code.ptx)
        assert re.search(r"ld\.global[.\w]*\.b16", code.ptx)


@pytest.mark.parametrize("m", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", [90, *[pytest.param(a, marks=pytest.mark.slow)
                                                for a in (80, 100)]])  # fmt: skip
def test_final_sum(m, architecture):
    code = compiled(gram.gram_total, {"M": m, "BLOCK": 128}, architecture, OPTIONS)
    assert_no_spills(code)
    assert "add.f64" in re.sub(r"add\.rn\.f64", "add.f64", code.ptx)
    assert not re.search(r"\b(red|atom)\.", code.ptx)
