"""What the Triton backend launches, on a machine without a GPU: `python launches.py ARCHITECTURE`.

A driver that compiles for a CUDA device and launches nothing stands in for Triton's own, so that
every call goes through Triton's own reading of its arguments: names, types, alignment, options.
Prints a JSON line for each kernel when it is first launched, and one with the launches of each
call. In a process of its own: what it compiles must not meet a real device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from raco_fast.backends import cuda
from raco_fast.backends.rounding import ROUNDINGS, Rounding
from raco_fast.backends.types import AdamWOptions, Update

launched: list[str] = []


class Binaries:
    """Loads nothing."""

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    """Made when a kernel has been compiled, called at every launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._name = source.fn.__name__
        names = source.fn.arg_names
        divisible = [names[place[0]] for place, found in source.attrs.items() if found]
        types = {n: t for n, t in source.signature.items() if t != "constexpr"}
        print(
            json.dumps({"kernel": self._name, "types": types, "divisible": sorted(set(divisible))})
        )

    def __call__(self, *_: Any) -> None:
        launched.append(self._name)


class Driver:
    """A CUDA device that is not there."""

    utils = Binaries()
    launcher_cls = Launcher

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def tensors(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Of several sizes, and the last one at an address that is no multiple of 16."""
    sizes = [(40_000 + 8 * k,) for k in range(count - 1)]
    return [*(torch.zeros(s, dtype=dtype) for s in sizes), torch.zeros(33, dtype=dtype)[1:]]


def report(call: str, run: Callable[[], object]) -> None:
    """Run and print what it launched."""
    launched.clear()
    run()
    print(json.dumps({"call": call, "launched": launched}))


def update(count: int, m: int, rounding: str, lr: float) -> Callable[[], object]:
    bf16 = torch.bfloat16
    residuals = tensors(count, bf16) if rounding == "split" else []
    grads = [tensors(count, bf16) for _ in range(m)]
    states = [tensors(count, torch.float32) for _ in range(2)]
    steps = [torch.zeros(()) for _ in range(count)]
    how = Rounding(rounding, residuals, seed=count)
    params = tensors(count, bf16)
    alpha = torch.ones(m, dtype=torch.float64)
    made = Update(params, grads, *states, [], steps, AdamWOptions(lr=lr), how)
    return lambda: cuda.combine_adamw(made, alpha, {})


def combination(count: int, m: int, dtype: torch.dtype) -> Callable[[], object]:
    grads, out = [tensors(count, dtype) for _ in range(m)], tensors(count, dtype)
    return lambda: cuda.combine(grads, torch.ones(m, dtype=torch.float64), out)


def layer(
    rows: int, features: int, m: int, dtype: torch.dtype, fresh: bool, products: bool
) -> None:
    x, dy = (torch.zeros(rows, features, dtype=torch.bfloat16) for _ in range(2))
    out = torch.zeros(m, features, features, dtype=dtype)
    U = torch.ones(m, 2, dtype=torch.float64)
    cuda.weight_grad(x, dy, [0, rows // 2, rows], U, out, fresh, products)


def main() -> None:
    """Every operation, each with two numbers of tensors, rows and so of chunks."""
    driver.set_active(Driver(int(sys.argv[1])))
    for count in (2, 40):
        for dtype in (torch.bfloat16, torch.float32):
            grads = [tensors(count, dtype) for _ in range(2)]
            report("gram", lambda grads=grads: cuda.gram(grads, {}))
            report("combine", combination(count, 2, dtype))
        for rounding in ROUNDINGS:
            report(f"combine_adamw, {rounding}", update(count, 2, rounding, 0.1 / count))
    for rows in (256, 1000):
        for fresh in (True, False):
            dtype = torch.float32 if fresh else torch.bfloat16
            for call, products in (("weight_grad", False), ("weight_grad, products", True)):
                report(call, partial(layer, rows, 512, 2, dtype, fresh, products))


if __name__ == "__main__":
    main()
