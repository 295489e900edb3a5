"""These tests run the Triton kernels: on a CUDA device, or in Triton's interpreter on the CPU.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, and then holds for the
whole process; `tests/test_kernels_interpreted.py` starts such a process. Without either, nothing
here is collected.

The interpreter is repaired here in two places, in the tests only:
- float32 -> bfloat16 truncates in triton 3.6 and 3.9; devices round to nearest even;
- loop bounds call int() on an array of one element, which numpy >= 2.4 refuses (triton 3.6).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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


def repair_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    cast = interpreter.InterpreterBuilder.cast_impl

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

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.cast_impl = rounding_cast


if INTERPRETED:
    repair_interpreter()
