"""The Gram kernels against float64 arithmetic written another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raco_fast.backends import cuda, ops
from raco_fast.backends.plan import Plan
from raco_fast.backends.types import Metric
from raco_fast.kernels import gram as gram_kernels

# Around the 512 or 1024 elements of a block, the 4096 of a chunk, and the 4 or 8 of a thread.
SIZES = [(1,), (0, 4), (3, 3), (1023,), (5, 205), (), (8,), (4095,), (4097,), (9,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_gradients(
    m: int, dtype: torch.dtype, device: torch.device, sizes=SIZES, seed: int = 0
) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for i in range(m):
        draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
        lists.append([(3.0 ** -(i % 3) * g + 0.1).to(device, dtype) for g in draw])
    return lists


def rows(grads: list[list[Tensor | None]], dtype: torch.dtype = torch.float64) -> Tensor:
    sizes = [next(g for g in column if g is not None) for column in zip(*grads, strict=True)]
    dense = [
        [torch.zeros_like(s) if g is None else g for g, s in zip(one, sizes, strict=True)]
        for one in grads
    ]
    return torch.stack([torch.cat([g.to(dtype).flatten() for g in one]) for one in dense]).cpu()


def assert_accurate(M: Tensor, grads: list[list[Tensor | None]]) -> None:
    """At most twice as far from float64 as plain torch in float32."""
    G, plain = rows(grads), rows(grads, torch.float32)
    truth = G @ G.T
    norms = truth.diagonal().sqrt()
    error, plain_error = [
        float(((x.double() - truth).abs() / torch.outer(norms, norms)).max())
        for x in (M, plain @ plain.T)
    ]
    assert M.dtype == torch.float64
    assert M.device.type == "cpu"
    assert torch.equal(M, M.T)
    assert error <= 2 * max(plain_error, 2.0**-24)


def gram_of(grads) -> Tensor:
    """On the CPU; the backend leaves it on the device."""
    return cuda.gram(grads, {}).cpu()


@pytest.mark.parametrize(
    ("m", "dtype"),
    [
        (1, torch.bfloat16),
        (2, torch.float32),
        (2, torch.bfloat16),
        (2, torch.float16),
        (3, torch.bfloat16),
        (4, torch.float32),
        (8, torch.bfloat16),
        *[pytest.param(m, dtype, marks=pytest.mark.slow) for m in range(1, 9) for dtype in DTYPES],
    ],
)
def test_all_sizes(m, dtype, device):
    grads = random_gradients(m, dtype, device)
    assert_accurate(gram_of(grads), grads)


@pytest.mark.parametrize("m", [5, 6, 7])
def test_other_numbers_of_objectives(m, device):
    grads = random_gradients(m, torch.bfloat16, device, [(1025,), (7,)])
    assert_accurate(gram_of(grads), grads)


@pytest.mark.parametrize("m", [9, *(pytest.param(m, marks=pytest.mark.slow) for m in (12, 32))])
def test_more_objectives_than_one_launch_takes(m, device):
    grads = random_gradients(m, torch.float32, device, [(517,), (3,)])
    grads[m - 1][0] = None
    assert_accurate(gram_of(grads), grads)


@pytest.mark.parametrize("m", range(9, 33))
def test_any_two_blocks_of_objectives_fit_one_launch(m):
    blocks = gram_kernels.objective_blocks(m)
    assert [i for block in blocks for i in block] == list(range(m))
    assert len(blocks) >= 2
    assert all(1 <= len(block) <= gram_kernels.MAX_UNROLLED // 2 for block in blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_missing_gradients_count_as_zeros(dtype, device):
    grads: list[list[Tensor | None]] = [*random_gradients(3, dtype, device)]
    for i, k in [(0, 3), (1, 3), (2, 4), (0, 5), (1, 0), (2, 7), (0, 9)]:
        grads[i][k] = None
    assert_accurate(gram_of(grads), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_at_addresses_that_are_no_multiple_of_16(dtype, device):
    grads = random_gradients(2, dtype, device, [(1030,), (1030,), (17,)])
    grads[0][1], grads[1][2] = grads[0][1][1:], grads[1][2][3:]
    grads[1][1], grads[0][2] = grads[1][1][:-1], grads[0][2][:-3]
    assert grads[0][1].data_ptr() % 16 != 0
    assert_accurate(gram_of(grads), grads)


def test_several_dtypes_in_one_model(device):
    parts = [
        random_gradients(2, dtype, device, [(700,), (5,)], seed)
        for seed, dtype in enumerate(DTYPES)
    ]
    grads = [[g for part in parts for g in part[i]] for i in range(2)]
    assert_accurate(gram_of(grads), grads)


def test_hundreds_of_tensors(device):
    grads = random_gradients(2, torch.bfloat16, device, [(1 + k % 5,) for k in range(200)])
    assert_accurate(gram_of(grads), grads)


def test_sum_over_programs_is_float64(device):
    # In float32 the ones would vanish beside 2^24; every tensor is a chunk of its own.
    grads = [[torch.tensor([4096.0], device=device), *[torch.ones(1, device=device)] * 15]]
    assert gram_of(grads).item() == 2.0**24 + 15


def test_memory_layout_does_not_matter(device):
    a, b = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(2)).to(device)
    plain = gram_of([[a], [b]])
    transposed = a.t().contiguous().t()
    assert torch.equal(plain, gram_of([[a], [b.t().contiguous().t()]]))
    both = gram_of([[transposed], [b.t().contiguous().t()]])
    assert_accurate(both, [[a], [b]])
    sliced = torch.cat([a, a], dim=1)[:, :40]
    assert_accurate(gram_of([[sliced], [b]]), [[a], [b]])
    expanded = torch.ones(1, device=device).expand(30, 40)
    assert_accurate(gram_of([[expanded], [b]]), [[expanded], [b]])


def test_expanded_tensors_are_refused_by_the_launcher(device):
    expanded = torch.ones(1, device=device).expand(30)
    with pytest.raises(ValueError, match=r"number 0 must fill one stretch .* strides \[0\]"):
        gram_kernels.gram([[expanded]], device)


def test_equal_inputs_give_equal_bits(device):
    grads = random_gradients(3, torch.float32, device)
    copies = [[g.clone() for g in one] for one in grads]
    assert torch.equal(gram_of(grads), gram_of(copies))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_show(bad, device):
    grads = random_gradients(2, torch.bfloat16, device, [(9,), (1030,)])
    grads[1][1][1029] = bad
    M = gram_of(grads)
    assert torch.isfinite(M[0, 0])
    assert not torch.isfinite(M[1, 1])


def test_gram_of_nothing_is_zero(device):
    empty = torch.empty(0, 3, device=device)
    for grads in ([[], []], [[None], [None]], [[empty], [empty]]):
        assert torch.equal(gram_of(grads), torch.zeros(2, 2, dtype=torch.float64))


# The same, and in the metric of AdamW's update.


def moments_of(grads, dtype: torch.dtype) -> Metric:
    """10^-10 to 1; every third element is 0, and the second tensor has none."""
    draw, shaped = torch.Generator().manual_seed(1), []
    for k, column in enumerate(zip(*grads, strict=True)):
        g = next(g for g in column if g is not None)
        v = 10 ** (-10 * torch.rand(g.numel(), generator=draw, dtype=torch.float64))
        v[::3] = 0.0
        shaped.append(None if k == 1 else v.view(g.shape).to(g.device, dtype))
    numbers = torch.arange(1.0, 1.0 + len(shaped), dtype=torch.float64)[:, None]
    return Metric(shaped, numbers * torch.tensor([1.7, 1e-4, 0.3], dtype=torch.float64))


def turned(grads, metric: Metric, dtype: torch.dtype) -> list[list[Tensor | None]]:
    """√D g_i."""
    found: list[list[Tensor | None]] = [[] for _ in grads]
    for column, v, numbers in zip(
        zip(*grads, strict=True), metric.moments, metric.numbers.to(dtype), strict=True
    ):
        for one, g in zip(found, column, strict=True):
            if g is None or v is None:
                one.append(g if g is None else torch.zeros_like(g, dtype=dtype))
                continue
            root, eps, factor = numbers.to(g.device)
            D = torch.where(v == 0, 0.0, factor / (v.to(dtype).sqrt() * root + eps))
            one.append(g.to(dtype) * D.sqrt())
    return found


def assert_accurate_in_metric(found: Tensor, grads, metric: Metric) -> None:
    M, H = found.cpu()
    assert_accurate(M, grads)
    exact, plain = (rows(turned(grads, metric, d), d) for d in (torch.float64, torch.float32))
    truth = exact @ exact.T
    norms = truth.diagonal().sqrt()
    error, plain_error = [
        float(((x.double() - truth).abs() / torch.outer(norms, norms)).max())
        for x in (H, plain @ plain.T)
    ]
    assert torch.equal(H, H.T)
    assert error <= 2 * max(plain_error, 2.0**-23)


@pytest.mark.parametrize(
    ("m", "dtype", "moment"),
    [
        (2, torch.bfloat16, torch.float32),
        (2, torch.float32, torch.float32),
        (3, torch.bfloat16, torch.bfloat16),
        (7, torch.float16, torch.float32),
        *[
            pytest.param(m, d, v, marks=pytest.mark.slow)
            for m in (*range(1, 9), 20)
            for d, v in [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
        ],
    ],
)
def test_in_the_metric(m, dtype, moment, device):
    sizes = SIZES if m < 7 else [(517,), (3,)]
    grads: list[list[Tensor | None]] = [*random_gradients(m, dtype, device, sizes)]
    metric = moments_of(grads, moment)
    assert_accurate_in_metric(cuda.gram_in_metric(grads, metric, {}), grads, metric)


def test_in_the_metric_with_what_is_missing_or_lies_otherwise(device, as_on_cuda):
    sizes = [(1030,), (9,), (30, 40), (5,)]
    grads: list[list[Tensor | None]] = [*random_gradients(2, torch.bfloat16, device, sizes)]
    grads[0][3] = grads[1][1] = None
    metric = moments_of(grads, torch.float32)
    grads[1][2] = grads[1][2].t().contiguous().t()
    metric.moments[0] = torch.cat([metric.moments[0][:1], metric.moments[0]])[1:]
    assert metric.moments[0].data_ptr() % 16 != 0
    found, plan = ops.gram_in_metric(grads, metric), Plan()
    assert_accurate_in_metric(found, grads, metric)
    for _ in range(2):  # the second one from the tables of the first
        assert torch.equal(found, ops.gram_in_metric(grads, metric, plan))
    metric.moments[2][3, 4] = torch.nan
    M, H = ops.gram_in_metric(grads, metric).cpu()
    assert M.isfinite().all()
    assert H.isnan().any()
