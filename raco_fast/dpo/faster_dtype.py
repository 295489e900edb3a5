"""In which dtype a model of some size trains faster on a device, measured.

Whether bfloat16 pays on a CPU is a matter of its instructions and of the library built on them:
with AMX or AVX-512 BF16 products are several times as fast as in float32, and without they take
several times as long. So a block of a transformer of the model's size is run in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

DtypeName: TypeAlias = Literal["fp32", "bf16"]

_TOKENS = 96
_WIDEST = 512  # a wider block would take seconds and say the same
_RUNS = 3
_HEAD = 64
# Scores in bfloat16 carry noise that those in float32 do not: what is gained has to be worth it.
_WORTH_IT = 1.2


@dataclass(frozen=True)
class Timings:
    """Milliseconds of a block's forward and backward pass."""

    fp32: float
    bf16: float
    threads: int

    @property
    def faster(self) -> DtypeName:
        """bf16 where it is clearly faster."""
        return "bf16" if self.fp32 > _WORTH_IT * self.bf16 else "fp32"

    def __str__(self) -> str:
        return (
            f"a block of its size takes {self.fp32:.1f} ms in float32 and {self.bf16:.1f} ms in "
            f"bfloat16, forward and backward on {self.threads} thread(s) of this CPU (bf16 has to "
            f"be {_WORTH_IT} times as fast)"
        )


def faster_dtype(config: Any, device: torch.device, *, full: bool) -> tuple[DtypeName, str]:
    """The dtype of a model's weights in which it trains faster, and why.

    Args:
        config: of a transformers causal LM.
        full: whether all weights are trained, so that their gradients are part of the time.
    Returns:
        On CUDA bf16, where the GPU has it; on a CPU what two seconds of measuring say; elsewhere
        fp32.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU multiplies in it"
        return "fp32", "this GPU has no bfloat16"
    if device.type != "cpu":
        return "fp32", f"bfloat16 was never compared on {device.type}"
    found = measured(*_sizes(config), full=full)
    return found.faster, str(found)


def _sizes(config: Any) -> tuple[int, int]:
    """Width of a model and of its MLP, in the model's ratio but no wider than is measured."""
    config = config.get_text_config()
    width = getattr(config, "hidden_size", None) or _WIDEST
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) and inner > 0 else 4 * width
    used = max(_HEAD, min(width, _WIDEST) // _HEAD * _HEAD)
    return used, max(_HEAD, inner * used // width)


@torch.enable_grad()
def measured(width: int, inner: int, *, full: bool) -> Timings:
    """Time a block of a decoder in both dtypes; the generators of random numbers stay untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        single = _block(width, inner, torch.float32, full=full)
        half = _block(width, inner, torch.bfloat16, full=full)
    single()
    fp32 = min(_milliseconds(single) for _ in range(_RUNS))
    bf16 = _milliseconds(half)  # the first pass, with what is set up in it
    if bf16 < 3 * fp32:
        bf16 = min(_milliseconds(half) for _ in range(_RUNS))
    return Timings(fp32, bf16, torch.get_num_threads())


def _milliseconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def _block(width: int, inner: int, dtype: torch.dtype, *, full: bool) -> Callable[[], None]:
    """Attention and a gated MLP with their norms and residuals: a forward and a backward pass."""
    heads = width // _HEAD

    def weight(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns) / columns**0.5
        leaf: Tensor = drawn.to(dtype).requires_grad_(full)
        return leaf

    x = torch.randn(1, _TOKENS, width).to(dtype).requires_grad_()
    qkv, out = weight(3 * width, width), weight(width, width)
    up, down = weight(2 * inner, width), weight(width, inner)
    scale = torch.ones(width, dtype=dtype, requires_grad=full)
    cos, sin = torch.randn(2, _TOKENS, _HEAD).to(dtype)

    def turned(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        rotated: Tensor = t * cos + torch.cat([-b, a], -1) * sin
        return rotated

    def run() -> None:
        h = F.linear(F.rms_norm(x, (width,), scale), qkv)
        q, k, v = (t.view(1, _TOKENS, heads, _HEAD).transpose(1, 2) for t in h.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        y = x + F.linear(mixed.transpose(1, 2).flatten(2), out)
        gate, value = F.linear(F.rms_norm(y, (width,), scale), up).chunk(2, -1)
        y = y + F.linear(F.silu(gate) * value, down)
        wanted = [x, *([qkv, out, up, down, scale] if full else [])]
        torch.autograd.grad(y, wanted, torch.ones_like(y))

    return run
