"""bfloat16 parameters end with the same bits on 1, 2 and 4 processes, however they are laid out.

Gradients are small integers, so that every sum and every Gram matrix is exact in any order, and
what could differ is the rounding of the update alone.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from quick_cases import matrix
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import raco_fast

SHAPES = {"a": (7, 5), "b": (13, 6), "c": (11,), "wide": (4, 9)}
WEIGHTS = [0.5, 0.3, 0.2]
LAYOUTS: dict[str, tuple[int, tuple[int, ...], Any]] = {
    "2 replicas": (2, (), None),
    "4 replicas": (4, (), None),
    "rows over 2": (2, (2,), [Shard(0)]),
    "rows over 4": (4, (4,), [Shard(0)]),
    "columns over 2": (2, (2,), [Shard(-1)]),
    "rows of copies": (4, (2, 2), [Replicate(), Shard(0)]),
    "rows and columns": (4, (2, 2), [Shard(0), Shard(-1)]),
}

ONE: tuple[int, tuple[int, ...], Any] = (1, (), None)


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name == "wide" else torch.bfloat16


def laid_out(p: Tensor, layout: str) -> Tensor:
    """A whole tensor as this layout has it; negative dimensions count from the last."""
    _, shape, placements = LAYOUTS.get(layout, ONE)
    if not shape:
        return p
    mesh = init_device_mesh("cpu", shape)
    own = [
        pl if isinstance(pl, Replicate) or pl.dim >= 0 else Shard(p.ndim + pl.dim)
        for pl in placements
    ]
    if p.ndim == 1 and len(set(own)) < len(own):
        own[1] = Replicate()
    return distribute_tensor(p, mesh, own)


def updated(layout: str, rounding: str, amsgrad: bool) -> dict[str, Tensor]:
    """The whole parameters after three steps."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    params = {
        name: nn.Parameter(laid_out(random(shape, dtype_of(name)), layout))
        for name, shape in SHAPES.items()
    }
    opt = raco_fast.ClippedCAGradAdamW(
        params.values(), lr=1e-2, weights=WEIGHTS, rounding=rounding, seed=5, amsgrad=amsgrad
    )
    for _ in range(3):
        losses = []
        for _ in WEIGHTS:
            terms = []
            for name, p in params.items():
                G = torch.randint(-4, 5, SHAPES[name], generator=generator).to(dtype_of(name))
                product = (p * laid_out(G, layout)).sum()
                terms.append(product.full_tensor() if isinstance(p, DTensor) else product)
            losses.append(sum(term.float() for term in terms))
        opt.backward(losses)
        # One way to form G0: another one rounds otherwise, and the kernels do not have amsgrad.
        with raco_fast.backend("reference") if amsgrad else nullcontext():
            opt.step()
        opt.zero_grad()
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in params.items()
    }


@cache
def on_one_process(rounding: str, amsgrad: bool) -> dict[str, Tensor]:
    assert not dist.is_initialized()
    return updated("one process", rounding, amsgrad)


@pytest.mark.parametrize(
    ("layout", "rounding", "amsgrad"),
    matrix(
        tuple(LAYOUTS),
        ("nearest", "stochastic", "split"),
        (False, True),
        quick=[
            ("2 replicas", "split", False),
            ("4 replicas", "stochastic", False),
            ("rows over 2", "nearest", True),
            ("rows over 2", "stochastic", False),
            ("rows over 4", "split", False),
            ("columns over 2", "stochastic", False),
            ("rows of copies", "stochastic", False),
            ("rows and columns", "stochastic", False),
            ("rows and columns", "split", True),
        ],
    ),
)
def test_the_same_bits(run, layout: str, rounding: str, amsgrad: bool) -> None:
    one = on_one_process(rounding, amsgrad)
    for found in run(LAYOUTS[layout][0], updated, layout, rounding, amsgrad):
        for name, p in found.items():
            assert torch.equal(p, one[name]), name


def test_roundings_differ() -> None:
    nearest, stochastic, split = (
        on_one_process(r, False) for r in ("nearest", "stochastic", "split")
    )
    assert not torch.equal(nearest["b"], stochastic["b"])
    assert not torch.equal(nearest["b"], split["b"])
    assert torch.equal(nearest["wide"], stochastic["wide"])
