"""These tests run the Triton kernels: on a CUDA device, or in Triton's interpreter on the CPU.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, and then holds for the
whole process; `tests/kernels/test_interpreted.py` starts such a process. Without either, nothing
here is collected.

The interpreter is repaired here in four places, in the tests only:
- float32 -> bfloat16 truncates in triton 3.6 and 3.9; devices round to nearest even;
- `tl.dot` multiplies the bit patterns of bfloat16 operands as if they were integers;
- loop bounds call int() on an array of one element, which numpy >= 2.4 refuses (triton 3.6);
- tl.fma rounds the product of float64 before it adds; devices round once.
And it is made twice as fast: it would adapt triton's language at every call of every function, and
undo that after every launch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast.backends import choose, cuda
from raco_fast.backends.rounding import NEAREST, Rounding
from raco_fast.backends.types import AdamWOptions, Update

SPLIT = 2.0**27 + 1  # Veltkamp's: cuts a float64 into two halves whose products are exact
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Without it cuBLAS refuses the deterministic mode of `fresh_memory_is_nan`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """An element that a kernel forgets to write fails the test."""
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_on_cuda(monkeypatch) -> None:
    """In the interpreter CPU tensors pass for those of a CUDA device whose kernels are proved."""
    if INTERPRETED:
        parts = ("step", "gram_in_metric", "weight_grad")
        proved = {("triton", torch.device("cpu"), part): None for part in parts}
        monkeypatch.setattr(cuda, "is_on_device", lambda tensor: True)
        monkeypatch.setattr(cuda, "missing", lambda: None)
        monkeypatch.setattr(choose, "_disagreements", proved)


SIZES = [(1,), (0, 4), (511,), (3, 3), (1025,), (), (8,), (4099,)]
ALPHA = (0.6, 0.55, -0.25, 0.4, 1.2, 0.3, 0.8, 0.05)


class Problem:
    """Parameters, gradients and AdamW states in the middle of a run."""

    OPTIONS: ClassVar[AdamWOptions] = AdamWOptions(
        lr=0.013, beta1=0.85, beta2=0.97, eps=1e-6, weight_decay=0.07, foreach=False, fused=False
    )

    def __init__(self, device, m, grad, param, state, sizes=SIZES, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(scale: float, dtype: torch.dtype) -> list[Tensor]:
            values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
            return [(scale * v).to(device, dtype) for v in values]

        self.params = draw(0.3, param)
        self.grads: list[list[Tensor | None]] = [draw(0.1, grad) for _ in range(m)]
        self.exp_avgs = draw(0.05, state)
        self.exp_avg_sqs = [v.abs() for v in draw(0.01, state)]
        self.steps = [torch.tensor(6.0 + k) for k in range(len(sizes))]
        self.alpha = torch.tensor(ALPHA[:m], dtype=torch.float64)

    def state(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]

    def step(self, backend, alpha=None, rounding=NEAREST, **options) -> None:
        states = (self.exp_avgs, self.exp_avg_sqs, [], self.steps)
        update = Update(
            self.params, self.grads, *states, replace(self.OPTIONS, **options), rounding
        )
        backend.combine_adamw(update, self.alpha if alpha is None else alpha, {})

    def launch(self, rounding="nearest", residuals=None, alpha=None, seed=0, lr=OPTIONS.lr) -> None:
        """The kernel itself, with everything it reads from device memory."""
        from raco_fast.kernels import combine_adamw as kernels
        from raco_fast.kernels import tables

        device, m = self.params[0].device, len(self.grads)
        for step in self.steps:
            step += 1
        steps, options = torch.stack(self.steps), replace(self.OPTIONS, lr=lr)
        places = torch.from_numpy(Rounding().place_table(len(steps)))
        columns = [*self.grads, self.params, self.exp_avgs, self.exp_avg_sqs]
        kernels.combine_adamw(
            tables.build([*columns, residuals] if residuals else columns, m, device),
            m,
            cuda.hyper_rows(steps, len(steps), options).to(device),
            (self.alpha if alpha is None else alpha).float().to(device),
            torch.tensor([seed], device=device),
            rounding,
            places.to(device) if rounding == "stochastic" else None,
        )


@pytest.fixture
def make_problem(device: torch.device) -> partial[Problem]:
    """(m, dtypes of gradients, parameters and states, sizes, seed) -> `Problem` on the device."""
    return partial(Problem, device)


def repair_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    cast = interpreter.InterpreterBuilder.cast_impl
    multiply_add = interpreter.InterpreterBuilder.create_fma
    dot = interpreter.InterpreterBuilder.create_dot

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        value = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])  # noqa: E731
        scope.set_attr(tensor, "__index__", value)

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            wide = np.ascontiguousarray(source.data).view(np.uint16).astype(np.uint32) << 16
            return interpreter.TensorHandle(wide.view(np.float32), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            bits = narrow.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, target)

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.float64:
            return multiply_add(self, x, y, z)
        a, b = x.data, y.data
        product = a * b
        high_a, high_b = [v * SPLIT - (v * SPLIT - v) for v in (a, b)]  # 26 bits each
        low_a, low_b = a - high_a, b - high_b
        lost = (high_a * high_b - product + high_a * low_b + low_a * high_b) + low_a * low_b
        return interpreter.TensorHandle(product + z.data + lost, tl.float64)

    interpreter.InterpreterBuilder.create_fma = fused

    def widening_dot(self: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = [rounding_cast(self, operand, tl.float32) for operand in (a, b)]
        return dot(self, a, b, c, *options)

    interpreter._patch_lang = cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    interpreter.InterpreterBuilder.create_dot = widening_dot


if INTERPRETED:
    repair_interpreter()
