"""The update kernel's roundings against their plain twin, to the bit, and against float32 runs."""

import os

import cuts
import pytest
import torch

from raco_fast import ClippedCAGradAdamW
from raco_fast.backends import choose, cuda
from raco_fast.backends.rounding import ROUNDINGS, Place, Rounding
from raco_fast.kernels import combine_adamw as kernels
from raco_fast.kernels import tables

# The interpreter computes in numpy, which warns of inf - inf; devices do not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
bf16, fp32, int16 = torch.bfloat16, torch.float32, torch.int16
SIZES = [(530,), (9,), (3, 4), (33, 65)]


def residuals_of(params, rounding):
    """Zeros, as the kernel wants them; None where it wants none."""
    return [torch.zeros_like(p, dtype=int16) for p in params] if rounding == "split" else None


def float32_twin(problem):
    """The same problem with float32 parameters."""
    problem.params = [p.float() for p in problem.params]
    return problem


def masters(params, residuals, rounding):
    """The float32 weights that are stored."""
    twin = Rounding(rounding, [r.view(bf16) for r in residuals or []])
    return [twin.opened(p, k) for k, p in enumerate(params)]


@pytest.mark.parametrize(
    ("rounding", "state"),
    [
        ("stochastic", fp32),
        ("split", bf16),
        *(
            pytest.param(*c, marks=pytest.mark.slow)
            for c in (("stochastic", bf16), ("split", fp32))
        ),
    ],
)
def test_the_kernel_stores_what_the_twin_stores(rounding, state, make_problem):
    ours, plain = [make_problem(2, bf16, bf16, state, SIZES) for _ in range(2)]
    residuals = residuals_of(ours.params, rounding)
    stored = [p.clone() for p in plain.params]
    twin = Rounding(rounding, [r.clone().view(bf16) for r in residuals or []], seed=12345)
    for seed in range(4):
        ours.grads = plain.grads = make_problem(2, bf16, bf16, state, SIZES, seed).grads
        plain.params = [twin.opened(p, k) for k, p in enumerate(stored)]
        ours.launch(rounding, residuals, seed=12345)
        plain.launch()  # the same arithmetic, with a float32 result
        for k, w in enumerate(plain.params):
            twin.store(w, stored[k], k, plain.steps[k])
    found = [*ours.params, *ours.exp_avgs, *(residuals or [])]
    for a, b in zip(found, [*stored, *plain.exp_avgs, *twin.residuals], strict=True):
        if INTERPRETED:
            assert torch.equal(bits_of(a), bits_of(b))
        else:  # two kernels on a device may contract products differently
            assert (bits_of(a) == bits_of(b)).double().mean() > 0.95


BEYOND = cuts.BEYOND_32_BITS
LONG_ROWS = [
    Place(3, 2**32 - 1200, 1500, 1501),
    Place(2),
    Place(2, 7),
    Place(0, 2**33, 2000, 2**33),
]


@pytest.mark.parametrize(
    ("places", "rows"),
    [
        pytest.param(BEYOND[:4], True, id="beyond 32 bits"),
        pytest.param(BEYOND[2:], True, id="narrow and wide rows"),
        pytest.param(LONG_ROWS, True, id="rows longer than a chunk"),
        pytest.param([Place(7, 2**33 - 5), *map(Place, range(3))], True, id="a run beyond 32 bits"),
        pytest.param([Place(5, 77), Place(4, 2**40 + 3), *map(Place, (0, 9))], False, id="runs"),
    ],
)
def test_a_shard_is_rounded_by_its_elements_numbers(places, rows, make_problem, monkeypatch):
    monkeypatch.setattr(tables, "_CHUNKS", ((1 << 24, 1024),))
    variants = []
    step = kernels.combine_adamw
    monkeypatch.setattr(
        kernels, "combine_adamw", lambda *args: (variants.append(args[7]), step(*args))[1]
    )
    ours, plain = [make_problem(2, bf16, bf16, fp32, SIZES) for _ in range(2)]
    how = Rounding("stochastic", seed=12345, places=places)
    ours.step(cuda, rounding=how)
    stored, plain.params = plain.params, [p.float() for p in plain.params]
    plain.step(cuda)
    for k, w in enumerate(plain.params):
        how.store(w, stored[k], k, plain.steps[k])
    assert variants == [rows, False]
    for a, b in zip(ours.params, stored, strict=True):
        if INTERPRETED:
            assert torch.equal(bits_of(a), bits_of(b))
        else:  # two kernels on a device may contract products differently
            assert (bits_of(a) == bits_of(b)).double().mean() > 0.95


def bits_of(t):
    return t.view(int16 if t.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_the_optimizer_steps_alike_on_both_backends(rounding, device, as_on_cuda, monkeypatch):
    shapes = [(20, 13), (70,)]
    generator = torch.Generator().manual_seed(4)
    starts = [torch.randn(s, generator=generator).to(device, bf16) for s in shapes]
    slopes = [[torch.randn(s, generator=generator).to(device) for s in shapes] for _ in range(10)]

    def run(backend):
        params = [torch.nn.Parameter(p.clone()) for p in starts]
        groups = [{"params": [p]} for p in params]
        opt = ClippedCAGradAdamW(
            groups, lr=1e-3, weight_decay=0.1, weights=[0.3, 0.7], rounding=rounding, seed=7
        )
        with choose.backend(backend):
            for t in range(5):
                losses = [
                    sum((p * g).sum() for p, g in zip(params, slopes[2 * t + i], strict=True))
                    for i in range(2)
                ]
                opt.zero_grad()
                opt.backward(losses)
                opt.step()
        states = [opt.state[p] for p in params]
        residuals = [s["split_residual"] for s in states if rounding == "split"]
        return masters([p.detach() for p in params], residuals, rounding)

    ran = []
    step = kernels.combine_adamw
    monkeypatch.setattr(
        kernels, "combine_adamw", lambda *args: (ran.append(args[5]), step(*args))[1]
    )
    ours = run("triton")
    assert ran == [rounding] * 10  # five steps of two groups
    plain = run("reference")
    assert len(ran) == 10
    for w, v, start in zip(ours, plain, starts, strict=True):
        moved = (v - start.float()).abs().sum()
        assert (w - v).abs().sum() < (0.05 if rounding == "stochastic" else 0.01) * moved


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
def test_steps_that_stay_on_the_device_round_alike(rounding, device, as_on_cuda):
    generator = torch.Generator().manual_seed(5)
    starts = [torch.randn(n, generator=generator).to(device, bf16) for n in (300, 41)]

    def run(capturable):
        params = [torch.nn.Parameter(p.clone()) for p in starts]
        opt = ClippedCAGradAdamW(
            params, lr=1e-3, weights=[0.3, 0.7], capturable=capturable, rounding=rounding, seed=7
        )
        for t in range(3):
            opt.zero_grad()
            losses = [sum(((p - i) * (p + t)).sum() for p in params) for i in range(2)]
            opt.backward(losses)
            opt.step()
            assert (opt._on_device is not None) == capturable
        states = [opt.state[p] for p in params]
        residuals = [s["split_residual"] for s in states if rounding == "split"]
        return masters([p.detach() for p in params], residuals, rounding)

    for w, v, start in zip(run(True), run(False), starts, strict=True):
        moved = (v - start.float()).abs().sum()
        assert (w - v).abs().sum() < 0.01 * moved


def test_stochastic_rounding_depends_on_neither_grid_nor_chunks_nor_alignment(
    make_problem, monkeypatch
):
    def run(shift, seed=5):
        problem = make_problem(2, bf16, bf16, fp32, [(9000 + shift,), (9,)])
        plain = make_problem(2, bf16, bf16, fp32, [(9000,), (9,)])
        for mine, model in zip(problem.grads, plain.grads, strict=True):
            mine[:] = model
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            target, source = getattr(problem, name), getattr(plain, name)
            target[0] = target[0][shift:].copy_(source[0])
            target[1] = source[1]
        problem.launch("stochastic", seed=seed)
        return problem.params

    first = run(0)
    monkeypatch.setattr(tables, "_CHUNKS", ((1 << 24, 1024),))
    monkeypatch.setitem(kernels.PROGRAMS, "stochastic", 3)
    for again in (run(0), run(1)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], run(0, seed=6)[0])


@pytest.mark.parametrize("rounding", ["stochastic", "split"])
def test_rounding_in_integers_does_not_lose_nan(rounding, make_problem):
    problem = make_problem(1, bf16, bf16, fp32, [(64,)])
    problem.exp_avgs[0].view(torch.int32)[2] = 0x7FFFFFFF  # NaN as devices write it
    residuals = residuals_of(problem.params, rounding)
    for _ in range(2):
        problem.launch(rounding, residuals, seed=1)
        assert problem.params[0].isnan().nonzero().flatten().tolist() == [2]


def test_split_master_is_the_float32_run(make_problem):
    split = make_problem(2, bf16, bf16, fp32, [(137,)])
    exact = float32_twin(make_problem(2, bf16, bf16, fp32, [(137,)]))
    residuals = residuals_of(split.params, "split")
    for seed in range(20):
        fresh = make_problem(2, bf16, bf16, fp32, [(137,)], seed)
        split.grads = exact.grads = fresh.grads
        split.launch("split", residuals)
        exact.launch()
    (w,), (exact_w,) = masters(split.params, residuals, "split"), exact.params
    if INTERPRETED:
        assert torch.equal(w, exact_w)
    else:  # two kernels on a device may contract products differently
        torch.testing.assert_close(w, exact_w, rtol=5e-6, atol=1e-8)
    torch.testing.assert_close(split.params[0].float(), exact_w, rtol=2.0**-8, atol=0)


def test_split_master_survives_every_residual(make_problem, device):
    # A step of size zero must give back weight and residual, also at the ends of int16.
    edge = torch.tensor([-32768, -32767, -1, 0, 1, 32766, 32767], dtype=int16)
    weights = torch.tensor([1.0, -1.0, 0.5, -3.0e-5, 2.0**30, 1.0078125])
    problem = make_problem(1, bf16, bf16, fp32, [(42,)])
    problem.params = [weights.repeat_interleave(7).to(device, bf16)]
    residuals = [edge.repeat(6).to(device)]
    before = [problem.params[0].clone(), residuals[0].clone()]
    problem.launch("split", residuals, lr=0.0)
    assert torch.equal(problem.params[0], before[0])
    assert torch.equal(residuals[0], before[1])
