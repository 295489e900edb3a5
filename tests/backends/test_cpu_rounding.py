"""The C++ kernel's roundings of bfloat16 weights against their plain twin, to the bit."""

from collections.abc import Sequence

import cuts
import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast import _C
from raco_fast.backends import choose, cpu, ops
from raco_fast.backends.rounding import ROUNDINGS, Place, Rounding
from raco_fast.backends.types import AdamWOptions, Update

bf16, fp32 = torch.bfloat16, torch.float32
SHAPES = [(3,), (17, 5), (0, 4), (_C.BLOCK + 1,), (), (_C.CHUNK + 9,)]
ALPHA = torch.tensor([0.9, 0.4], dtype=torch.float64)
OPTIONS = AdamWOptions(lr=0.003, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.3)


def draw(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t() if t.dim() == 2 else t


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.view(torch.int16 if t.dtype == bf16 else torch.int32) for t in tensors]


class Run:
    """Weights and states, and how the weights are rounded."""

    def __init__(self, rounding: str, state: torch.dtype, places: Sequence[Place] = ()) -> None:
        self.params = [transposed(p) for p in draw(1, bf16)]
        self.states = [[transposed(s) for s in draw(2, state)], draw(3, state)]
        self.states[1] = [transposed(s.square()) for s in self.states[1]]
        self.steps = [torch.tensor(float(k)) for k in range(len(SHAPES))]
        residuals = [torch.zeros_like(p) for p in self.params] if rounding == "split" else []
        self.rounding = Rounding(rounding, residuals, seed=2**33 + 5, places=places)

    def update(self, params: list[Tensor], grads: list[list[Tensor]], rounding: Rounding) -> None:
        """One step on the C++ backend."""
        with choose.backend("cpu"):
            update = Update(params, grads, *self.states, [], self.steps, OPTIONS, rounding)
            ops.combine_adamw(update, ALPHA)


@pytest.mark.parametrize("state", [bf16, fp32])
@pytest.mark.parametrize(
    ("rounding", "places"),
    [
        ("stochastic", ()),
        ("stochastic", cuts.BEYOND_32_BITS),
        ("stochastic", cuts.BEYOND_32_BITS[::-1]),
        ("split", ()),
    ],
)
def test_the_kernel_stores_what_the_twin_stores(rounding, places, state):
    ours, plain = Run(rounding, state, places), Run(rounding, state, places)
    for t in range(4):
        grads = [[transposed(g) for g in draw(10 * t + i, bf16)] for i in range(2)]
        ours.update(ours.params, grads, ours.rounding)
        # The same arithmetic with a float32 result, which the twin then stores.
        weights = [plain.rounding.opened(p, k) for k, p in enumerate(plain.params)]
        plain.update(weights, grads, Rounding())
        for k, (w, p) in enumerate(zip(weights, plain.params, strict=True)):
            plain.rounding.store(w.clone(), p, k, plain.steps[k])
    found = [*ours.params, *ours.states[0], *ours.rounding.residuals]
    expected = [*plain.params, *plain.states[0], *plain.rounding.residuals]
    for a, b in zip(bits(found), bits(expected), strict=True):
        assert torch.equal(a, b)
    nearest = Run("nearest", state)
    for t in range(4):
        grads = [[transposed(g) for g in draw(10 * t + i, bf16)] for i in range(2)]
        nearest.update(nearest.params, grads, Rounding())
    assert not torch.equal(nearest.params[-1], ours.params[-1])


@pytest.mark.parametrize("cut", cuts.CUTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_of_shards_is_that_of_the_whole(backend, cut):
    generator = torch.Generator().manual_seed(6)
    p, g, other, m, v = (torch.randn(300, 500, generator=generator).to(bf16) for _ in range(5))
    assert p.numel() > 2 * _C.CHUNK

    def step(index: tuple[slice, slice], place: Place) -> Tensor:
        mine = [t[index].clone(memory_format=torch.contiguous_format) for t in (p, m, v.square())]
        how = Rounding("stochastic", seed=4, places=[place])
        states = [[t] for t in mine[1:]]
        grads = [[t[index].contiguous()] for t in (g, other)]
        with choose.backend(backend):
            update = Update(mine[:1], grads, *states, [], [torch.tensor(2.0)], OPTIONS, how)
            ops.combine_adamw(update, ALPHA)
        return mine[0]

    expected, found = step((slice(None), slice(None)), Place(2)), torch.empty_like(p)
    for index, place in cuts.shards(p, cut, 2):
        found[index] = step(index, place)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_nan_and_infinity_stay_what_they_are(rounding):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0], dtype=bf16)
    residuals = [torch.zeros(4, dtype=bf16)] if rounding == "split" else []
    params, zeros = [special.clone()], [[torch.zeros(4, dtype=bf16)] for _ in range(3)]
    with choose.backend("cpu"):
        how = Rounding(rounding, residuals)
        update = Update(params, [zeros[0]], *zeros[1:], [], [torch.zeros(())], OPTIONS, how)
        ops.combine_adamw(update, torch.ones(1, dtype=torch.float64))
    assert torch.equal(params[0].nan_to_num(nan=7.0), special.nan_to_num(nan=7.0))


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_same_bits_for_any_thread_count_and_target(rounding):
    grads = [draw(i, bf16) for i in range(2)]
    results = []
    for target in range(len(_C.CPU_TARGETS)):
        for threads in (1, 2, 5):
            run = Run(rounding, bf16)
            step(run, grads, threads=threads, target=target)
            results.append([*run.params, *run.states[0], *run.rounding.residuals])
    for other in results[1:]:
        for a, b in zip(bits(results[0]), bits(other), strict=True):
            assert torch.equal(a, b)


def step(run: Run, grads: list[list[Tensor]], **how) -> None:
    """One step through the extension itself; `how` overrides its arguments."""
    n = len(run.params)
    found = cpu.tables(grads, [run.params, *run.states, run.rounding.residuals])
    arguments = {
        "decay": 0.99,
        "beta1": 0.8,
        "beta2": 0.95,
        "eps": 1e-3,
        "step_sizes": np.full(n, 0.01),
        "root_corrections": np.full(n, 2.0),
        "rounding": _C.ROUNDINGS.index(run.rounding.name),
        "steps": np.arange(1.0, n + 1),
        "seed": 5,
        "residuals": found.beside[3][0],
        "residual_dtypes": found.beside[3][1],
        "places": run.rounding.place_table(n if run.rounding.name == "stochastic" else 0),
        "threads": 1,
        "target": 0,
    }
    of_each = [x for pair in found.beside[:3] for x in pair]
    _C.combine_adamw(*found.grads, ALPHA.numpy(), *of_each, **{**arguments, **how})


def test_the_extension_knows_the_roundings_of_the_twin():
    assert _C.ROUNDINGS == ROUNDINGS


def test_the_extension_refuses_what_would_write_elsewhere():
    grads = [draw(i, bf16) for i in range(2)]
    split = Run("split", bf16)
    none = {"residuals": np.empty(0, np.int64), "residual_dtypes": np.empty(0, np.uint8)}
    for how, message in [
        ({"rounding": 3}, "rounding must index ROUNDINGS"),
        (none, r"addresses must be \[n\]"),
        ({"residual_dtypes": np.zeros(len(SHAPES), np.uint8)}, "residuals must be stored as bfl"),
        ({"steps": np.ones(1)}, r"steps must be \[n\]"),
        ({"places": Rounding().place_table(len(SHAPES))}, r"places must be \[n, 4\] for stoch"),
    ]:
        with pytest.raises(ValueError, match=message):
            step(split, grads, **how)
    split.params = [p.float() for p in split.params]
    with pytest.raises(ValueError, match="rounding is for bfloat16 parameters"):
        step(split, grads)
