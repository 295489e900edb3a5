"""The machine code of Triton kernels, compiled for CUDA devices on a machine without one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Machine:
    """What was found in the machine code of one kernel."""

    registers: int
    local_bytes: int
    shared_bytes: int
    ops: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]  # innermost loops that load more than one element at once
    ptx: str
    ttir: str


def compiled(
    kernel: Any,
    types: dict[str, object],
    constants: dict[str, object],
    divisible: Collection[str],
    architecture: int,
    options: dict[str, object],
) -> Machine:
    """The kernel, compiled as it is for a launch with arguments of these types.

    Args:
        types: of the arguments; a tuple of types for a tuple of arguments.
        constants: the other arguments.
        divisible: arguments that are multiples of 16, as addresses or as numbers.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {}
    for name in divisible:
        place, kind = names.index(name), types[name]
        elements = [(place, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(place,)]
        attributes |= {element: [["tt.divisibility", 16]] for element in elements}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
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
        kernel.metadata.shared,
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


def assert_no_spills(code: Machine) -> None:
    assert code.local_bytes == 0
    assert not [op for op in code.ops if op.startswith(("LDL", "STL"))]


def assert_no_float_atomics(code: Machine) -> None:
    assert not re.search(r"\b(red|atom)\.", code.ptx)
