"""The C++ combine and AdamW against float64, and to the bit against themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast import _C
from raco_fast.backends import choose, cpu, ops, reference
from raco_fast.backends.types import AdamWOptions, Update

BLOCK, CHUNK = _C.BLOCK, _C.CHUNK
SHAPES = [(3,), (17, 5), (1,), (0, 4), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (2, 3, 4), ()]
SHAPES += [(CHUNK - 1,), (CHUNK,), (2 * CHUNK + 1,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = AdamWOptions(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.3)


@pytest.fixture(autouse=True)
def cpu_backend():
    """Whatever cannot run on the kernels raises, instead of passing on the reference."""
    with choose.backend("cpu"):
        yield


def draw(dtype: torch.dtype, seed: int, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def coefficients(m: int) -> Tensor:
    return torch.tensor([0.9 - 0.35 * i for i in range(m)], dtype=torch.float64)


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    return float(sum((a.double() - b).abs().sum() for a, b in zip(found, truth, strict=True)))


def g0_in_float64(grads: list[list[Tensor | None]], alpha: Tensor) -> list[Tensor]:
    return [
        sum(a * g.double() for a, g in zip(alpha, column, strict=True) if g is not None)
        for column in zip(*grads, strict=True)
    ]


def adamw_in_float64(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, **o) -> list[Tensor]:
    p, m, v = p.double(), m.double(), v.double()
    g = -g if o["maximize"] else g
    m = o["beta1"] * m + (1 - o["beta1"]) * g
    v = o["beta2"] * v + (1 - o["beta2"]) * g * g
    m_hat, v_hat = m / (1 - o["beta1"] ** t), v / (1 - o["beta2"] ** t)
    step = o["lr"] * (m_hat / (v_hat.sqrt() + o["eps"]) + o["weight_decay"] * p)
    return [p - step, m, v]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 12])
def test_combine_against_float64(m, dtype):
    grads = [draw(dtype, i) for i in range(m)]
    out = [torch.full_like(g, torch.nan) for g in grads[0]]
    plain = [torch.empty_like(g) for g in out]
    ops.combine(grads, coefficients(m), out)
    reference.combine(grads, coefficients(m), plain)
    truth = g0_in_float64(grads, coefficients(m))
    floor = 1e-15 * error(truth, [torch.zeros_like(x) for x in truth])
    assert error(out, truth) <= 2 * error(plain, truth) + floor


def test_combine_overwrites_a_gradient_and_fills_missing_with_zeros():
    grads = [draw(torch.bfloat16, i) for i in range(3)]
    expected = [torch.empty_like(g) for g in grads[0]]
    ops.combine(grads, coefficients(3), expected)
    missing = torch.full((2 * CHUNK,), torch.nan)
    lists = [[*grads[0], None], [*grads[1], None], [*grads[2], None]]
    ops.combine(lists, coefficients(3), [*grads[1], missing])
    assert all(torch.equal(a, b) for a, b in zip(grads[1], expected, strict=True))
    assert not missing.any()


@pytest.mark.parametrize("to", DTYPES[:3])
@pytest.mark.parametrize("of", DTYPES[:3])
def test_conversions_are_those_of_torch(of, to):
    """Every 16-bit pattern, its neighbours in float32, the midpoints, and random bits."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    if of == torch.float32:
        half = torch.cat([every.view(torch.bfloat16).float(), every.view(torch.float16).float()])
        half = torch.cat([half, torch.nextafter(half, 2 * half), (half + half.roll(1)) / 2])
        middle = half.view(torch.int32) + torch.tensor([[0x7FFF], [0x8000], [0x1000], [0xFFF]])
        random = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32)
        source = torch.cat([half, middle.view(torch.float32).flatten(), random.view(torch.float32)])
    else:
        source = every.view(of)
    for target in range(len(_C.CPU_TARGETS)):
        out = torch.empty_like(source, dtype=to)
        one = np.ones(1)
        tables = cpu.tables([[source]], [[out]])
        _C.combine(*tables.grads, one, *tables.beside[0], 1, target)
        expected = source.float().to(to)
        assert torch.equal(out.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(out[number], expected[number])
        assert torch.equal(out[number].signbit(), expected[number].signbit())


def problem(m: int, dtype: torch.dtype, shapes=SHAPES) -> dict:
    return {
        "params": draw(dtype, 100, shapes),
        "grads": [draw(dtype, i, shapes) for i in range(m)],
        "exp_avgs": [x * 0.1 for x in draw(dtype, 101, shapes)],
        "exp_avg_sqs": [x.square() for x in draw(dtype, 102, shapes)],
        "max_exp_avg_sqs": [],
        "steps": [torch.tensor(float(k % 4)) for k in range(len(shapes))],
    }


def copied(inputs: dict) -> dict:
    changing = ("params", "exp_avgs", "exp_avg_sqs", "steps")
    return {**inputs, **{name: [t.clone() for t in inputs[name]] for name in changing}}


def truth_of(inputs: dict, options: AdamWOptions = OPTIONS) -> list[list[Tensor]]:
    g0 = g0_in_float64(inputs["grads"], coefficients(len(inputs["grads"])))
    states = (inputs[name] for name in ("exp_avgs", "exp_avg_sqs", "steps"))
    steps = [
        adamw_in_float64(p, g, m, v, int(t) + 1, **vars(options))
        for p, g, m, v, t in zip(inputs["params"], g0, *states, strict=True)
    ]
    return [list(tensors) for tensors in zip(*steps, strict=True)]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_adamw_against_float64(m, dtype, maximize):
    options = replace(OPTIONS, maximize=maximize)
    ours = problem(m, dtype)
    theirs = copied(ours)
    truth = truth_of(ours, options)
    ops.combine_adamw(Update(**ours, options=options), coefficients(m))
    reference.combine_adamw(Update(**theirs, options=options), coefficients(m))
    for name, exact in zip(("params", "exp_avgs", "exp_avg_sqs"), truth, strict=True):
        assert all(t.dtype == dtype for t in ours[name])
        floor = 1e-15 * error(exact, [torch.zeros_like(x) for x in exact])
        assert error(ours[name], exact) <= 2 * error(theirs[name], exact) + floor
    assert [int(t) for t in ours["steps"]] == [k % 4 + 1 for k in range(len(SHAPES))]


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_of_another_dtype_round_once(dtype, state):
    ours = problem(2, dtype)
    for name in ("exp_avgs", "exp_avg_sqs"):
        ours[name] = [t.to(state) for t in ours[name]]
    theirs = copied(ours)  # plain torch in float32, rounded at the end
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        theirs[name] = [t.float() for t in theirs[name]]
    theirs["grads"] = [[g.float() for g in one] for one in ours["grads"]]
    truth = truth_of(ours)
    ops.combine_adamw(Update(**ours, options=OPTIONS), coefficients(2))
    reference.combine_adamw(Update(**theirs, options=OPTIONS), coefficients(2))
    for name, exact in zip(("params", "exp_avgs", "exp_avg_sqs"), truth, strict=True):
        plain = [t.to(o.dtype) for t, o in zip(theirs[name], ours[name], strict=True)]
        assert error(ours[name], exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count_and_target(dtype):
    results = []
    inputs = problem(3, dtype)
    inputs["grads"][1][11] = None
    for target in range(len(_C.CPU_TARGETS)):
        for threads in (1, 2, 5):
            run = copied(inputs)
            out = [torch.full_like(p, torch.nan) for p in run["params"]]
            names = ("params", "exp_avgs", "exp_avg_sqs")
            tables = cpu.tables(run["grads"], [out, *(run[name] for name in names)])
            of_out, of_params, of_exp_avgs, of_exp_avg_sqs = tables.beside
            alpha = coefficients(3).numpy()
            _C.combine(*tables.grads, alpha, *of_out, threads, target)
            _C.combine_adamw(
                *tables.grads,
                alpha,
                *of_params,
                *of_exp_avgs,
                *of_exp_avg_sqs,
                decay=0.99,
                beta1=0.8,
                beta2=0.95,
                eps=1e-3,
                step_sizes=np.linspace(0.01, 0.02, len(SHAPES)),
                root_corrections=np.linspace(1.0, 3.0, len(SHAPES)),
                rounding=0,
                steps=np.ones(len(SHAPES)),
                seed=0,
                residuals=np.empty(0, dtype=np.int64),
                residual_dtypes=np.empty(0, dtype=np.uint8),
                places=np.empty((0, 4), dtype=np.int64),
                threads=threads,
                target=target,
            )
            results.append([*out, *run["params"], *run["exp_avgs"], *run["exp_avg_sqs"]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layouts_do_not_matter_and_nothing_else_is_touched():
    """Misaligned and transposed tensors, each inside a larger buffer that must stay as it is."""
    shapes = [(CHUNK + 3,), (40, 30)]
    plain = problem(2, torch.bfloat16, shapes)
    moved = copied(plain)
    buffers = []

    def embedded(t: Tensor) -> Tensor:
        buffer = torch.full((t.numel() + 9,), 7.0, dtype=t.dtype)
        buffers.append(buffer)
        inner = buffer[3 : 3 + t.numel()]
        view = inner.view(t.shape) if t.dim() == 1 else inner.view(t.shape[::-1]).t()
        view.copy_(t)
        return view

    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        moved[name] = [embedded(t) for t in moved[name]]
    moved["grads"] = [[embedded(t) for t in one] for one in plain["grads"]]
    for inputs in (plain, moved):
        ops.combine_adamw(Update(**inputs, options=OPTIONS), coefficients(2))
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert all(torch.equal(a, b) for a, b in zip(plain[name], moved[name], strict=True))
    for buffer in buffers:
        assert (torch.cat([buffer[:3], buffer[-6:]]) == 7.0).all()


def test_autograd_notices_the_update():
    p = torch.linspace(1, 2, 5, requires_grad=True)
    loss = p.square().sum()
    states = [[torch.zeros(5)] for _ in range(2)]
    update = Update([p], [[torch.ones(5)]], *states, [], [torch.zeros(())], OPTIONS)
    with torch.no_grad():
        ops.combine_adamw(update, coefficients(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_float64_must_not_meet_other_dtypes_in_the_extension():
    wide, narrow = torch.ones(4, dtype=torch.float64), torch.ones(4)
    tables = cpu.tables([[wide]], [[narrow]])
    with pytest.raises(ValueError, match="float64 and other dtypes must not meet"):
        _C.combine(*tables.grads, np.ones(1), *tables.beside[0], 1)
