"""What is measured: parameter lists, dtypes and numbers of objectives, by size of machine."""

from dataclasses import dataclass
from typing import Any

import torch

from bench.harness.parameters import LISTS, elements
from bench.harness.problems import Tensors, random_like

bf16, fp32 = torch.bfloat16, torch.float32
EVERY_M = (2, 4, 3, 8)
# (list, dtype, numbers of objectives), the most telling first: a run may be cut short. A large list
# comes first: what is compiled for all sizes is compiled best for the size that it meets first.
SIZES: dict[str, tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]] = {
    "gpu": (
        ("Qwen3-4B", bf16, EVERY_M),
        ("Llama-3-8B", bf16, EVERY_M),
        ("300 small", bf16, (2,)),
        ("Gemma3-4B", bf16, (2, 4)),
        ("Qwen3-0.6B", bf16, EVERY_M),
        ("Qwen3-0.6B", fp32, (2, 4)),
        ("SmolLM2-135M", bf16, EVERY_M),
    ),
    "cpu": (("Llama-50M", fp32, (2,)), ("300 small", fp32, (2,)), ("Llama-50M", fp32, (4,))),
    "cpu-whole": (
        ("SmolLM2-135M", fp32, EVERY_M),
        ("300 small", fp32, (2,)),
        ("SmolLM2-135M", bf16, (2, 4)),
        ("Llama-50M", fp32, (2,)),
    ),
    "tiny": (("tiny", fp32, (2, 3)), ("tiny", bf16, (2,))),
}


@dataclass(frozen=True)
class Case:
    """m gradients of one dtype for the parameters of one list."""

    list: str
    dtype: torch.dtype
    m: int
    device: torch.device

    @property
    def elements(self) -> int:
        return elements(LISTS[self.list])

    def bytes(self, of_each: int, once: int) -> int:
        """In units of one gradient: `of_each` of the m objectives, and `once` besides."""
        return (of_each * self.m + once) * self.elements * self.dtype.itemsize

    def params(self) -> dict[str, Any]:
        """As it stands in the records."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"list": self.list, "elements": self.elements, "m": self.m, "dtype": dtype}

    def random(self, seed: int) -> Tensors:
        """One list of tensors of the size of gradients."""
        return random_like(list(LISTS[self.list].values()), self.dtype, self.device, seed)

    def gradients(self) -> list[Tensors]:
        return [self.random(seed) for seed in range(self.m)]


def cases(sizes: str, device: torch.device) -> list[Case]:
    return [Case(name, dtype, m, device) for name, dtype, ms in SIZES[sizes] for m in ms]
