"""Products in the metric of AdamW's update: float64, and the Euclidean ones to the bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast import _C
from raco_fast.backends import choose, cpu, ops
from raco_fast.backends.types import Metric

BLOCK, CHUNK = _C.BLOCK, _C.CHUNK
SHAPES = [(3,), (17, 5), (0, 4), (BLOCK + 1,), (2, 3, 4), (), (CHUNK + BLOCK + 3,)]
KINDS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
NUMBERS = (1.7, 1e-4, 0.3)

Lists = list[list[Tensor | None]]


def problem(m: int, dtype: torch.dtype, moment: torch.dtype, shapes=SHAPES) -> tuple[Lists, Metric]:
    """Gradients, of which some are missing, and second moments of 10^-10 to 1, some of them 0."""
    draw = torch.Generator().manual_seed(m)

    def normal(s) -> Tensor:
        return torch.randn(s, generator=draw, dtype=torch.float64)

    grads: Lists = [[(1.3**-i * normal(s) + 0.1).to(dtype) for s in shapes] for i in range(m)]
    moments: list[Tensor | None] = []
    for k, s in enumerate(shapes):
        v = 10 ** (-10 * torch.rand(s, generator=draw, dtype=torch.float64))
        moments.append(None if k == 1 else torch.where(normal(s) > 1.0, 0.0, v).to(moment))
    if m > 1:
        grads[0][4] = grads[m - 1][3] = None
    scale = torch.arange(1.0, len(shapes) + 1.0, dtype=torch.float64)[:, None]
    return grads, Metric(moments, torch.tensor(NUMBERS, dtype=torch.float64) * scale)


def rows(grads: Lists, metric: Metric, dtype: torch.dtype) -> Tensor:
    """√D g_i as one vector each."""
    root, eps, factor = (x.to(dtype) for x in metric.numbers.T)
    found = []
    for one in grads:
        parts = []
        for k, (g, v) in enumerate(zip(one, metric.moments, strict=True)):
            if g is not None and v is not None:
                D = factor[k] / (v.to(dtype).sqrt() * root[k] + eps[k])
                parts.append((g.to(dtype) * torch.where(v == 0, 0.0, D.sqrt())).flatten())
            else:
                like = g if g is not None else next(x[k] for x in grads if x[k] is not None)
                parts.append(torch.zeros(like.numel(), dtype=dtype))
        found.append(torch.cat(parts))
    return torch.stack(found)


def error(M: Tensor, truth: Tensor) -> float:
    norms = truth.diagonal().sqrt()
    return float(((M.double() - truth).abs() / torch.outer(norms, norms)).max())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 12])
def test_against_float64(m, kind, backend):
    grads, metric = problem(m, *kind)
    R = rows(grads, metric, torch.float64)
    wide = torch.float64 if kind[0] == torch.float64 else torch.float32
    plain = rows(grads, metric, wide)
    with choose.backend(backend):
        M, H = ops.gram_in_metric(grads, metric)
        assert torch.equal(M, ops.gram(grads))
    assert torch.equal(H, H.T)
    truth = R @ R.T
    # float64 is held to the bound of a sum in two levels, as the matrix of float64 is the truth.
    steps = BLOCK // 8 + CHUNK // BLOCK if wide == torch.float64 else 1
    floor = steps * torch.finfo(wide).eps
    assert error(H, truth) <= 2 * max(error(plain @ plain.T, truth), floor)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("m", [1, 3, 7])
def test_same_bits_for_any_thread_count_and_target(m, kind):
    grads, metric = problem(m, *kind)
    tables = cpu.tables(grads, [metric.moments])
    found = [
        _C.products_in_metric(
            *tables.grads, *tables.beside[0], metric.numbers.numpy(), threads, target
        ).tolist()
        for target in range(len(_C.CPU_TARGETS))
        for threads in (1, 2, 3)
    ]
    assert all(one == found[0] for one in found)


def test_other_layouts_and_kinds_of_tensors():
    """What the kernels do not take goes to plain torch, with the same result."""
    draw = torch.Generator().manual_seed(0)
    a, b, v = torch.randn(3, 30, 40, generator=draw, dtype=torch.float64)
    metric = Metric([v.square()], torch.tensor([NUMBERS], dtype=torch.float64))
    expected = ops.gram_in_metric([[a], [b]], metric)
    turned = [t.t().contiguous().t() for t in (a, b, v.square())]
    moved = ops.gram_in_metric([[turned[0]], [turned[1]]], Metric([turned[2]], metric.numbers))
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0.0)
    mixed = ops.gram_in_metric([[turned[0]], [b]], metric)  # not of one layout
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=0.0)
    # Of complex numbers AdamW has a second moment for either part.
    z, y, s = (torch.complex(t[:, :20], t[:, 20:]) for t in (a, b, v.square()))
    found = ops.gram_in_metric([[z], [y]], Metric([s], metric.numbers))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_of_nothing():
    empty = Metric([None], torch.ones(1, 3, dtype=torch.float64))
    for grads in ([[None], [None]], [[torch.ones(0)], [None]]):
        assert not ops.gram_in_metric(grads, empty).any()
    M, H = ops.gram_in_metric([[torch.ones(3)], [None]], empty)
    assert (M[0, 0], float(H.abs().max())) == (3.0, 0.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_not_finite_shows(backend):
    grads, metric = problem(2, torch.float32, torch.float32)
    with choose.backend(backend):
        metric.moments[6][CHUNK + 3] = torch.nan
        M, H = ops.gram_in_metric(grads, metric)
        assert M.isfinite().all()
        assert H.isnan().all()


def test_eps_of_zero():
    grads, metric = problem(2, torch.float32, torch.float32)
    metric.numbers[:, 1] = 0.0
    _, H = ops.gram_in_metric(grads, metric)
    R = rows(grads, metric, torch.float64)
    assert error(H, R @ R.T) < 1e-6


def test_wrong_arguments():
    g, numbers = torch.ones(4), torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="one second moment and three numbers per gradient, got 0"):
        ops.gram_in_metric([[g]], Metric([], numbers))
    with pytest.raises(ValueError, match=r"numbers per gradient, got 1 and \[1, 2\] for 1"):
        ops.gram_in_metric([[g]], Metric([g], numbers[:, :2]))
    with pytest.raises(ValueError, match=r"`metric.moments`\[0\] must have the shape and device"):
        ops.gram_in_metric([[g]], Metric([torch.ones(5)], numbers))
    with pytest.raises(TypeError, match=r"`metric.moments`\[0\] must be a dense tensor"):
        ops.gram_in_metric([[g]], Metric([g.to_sparse()], numbers))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moments": np.zeros(2, np.int64)}, r"addresses must be \[n\]"),
        ({"numbers": np.zeros((1, 2))}, r"numbers must be \[n, 3\]"),
        (
            {"moments": np.array([64]), "moment_dtypes": np.array([3], np.uint8)},
            "float64 and",
        ),
    ],
)
def test_the_extension_checks_its_tables(change, message):
    good = {
        "grads": np.zeros((1, 1), np.int64),
        "lengths": np.array([5]),
        "dtypes": np.array([0], np.uint8),
        "moments": np.zeros(1, np.int64),
        "moment_dtypes": np.array([3], np.uint8),
        "numbers": np.ones((1, 3)),
        "threads": 1,
    }
    assert _C.products_in_metric(**good).tolist() == [[[[0.0]], [[0.0]]]]
    with pytest.raises(ValueError, match=message):
        _C.products_in_metric(**{**good, **change})
