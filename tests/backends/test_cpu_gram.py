"""The C++ Gram against float64, and to the bit against itself."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast import _C
from raco_fast.backends import choose, cpu, ops

BLOCK, CHUNK = _C.BLOCK, _C.CHUNK
SHAPES = [(3,), (17, 5), (1,), (0, 4), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (2, 3, 4), ()]
SHAPES += [(CHUNK - 1,), (CHUNK,), (3 * CHUNK + 1,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TARGETS = range(len(_C.CPU_TARGETS))

Lists = list[list[Tensor | None]]


@pytest.fixture(autouse=True)
def cpu_backend():
    """Whatever cannot run on the kernels raises, instead of passing on the reference."""
    with choose.backend("cpu"):
        yield


def gradients(m: int, dtype: torch.dtype, shapes=SHAPES, seed: int = 0) -> Lists:
    generator = torch.Generator().manual_seed(seed)
    lists: Lists = []
    for i in range(m):
        draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        lists.append([(1.3**-i * g + 0.1).to(dtype) for g in draw])
    return lists


def rows(grads: Lists, dtype: torch.dtype = torch.float64) -> Tensor:
    present = [next(g for g in column if g is not None) for column in zip(*grads, strict=True)]
    return torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).to(dtype).flatten()
                    for g, p in zip(one, present, strict=True)
                ]
            )
            for one in grads
        ]
    )


def relative_error(M: Tensor, truth: Tensor) -> float:
    norms = truth.diagonal().sqrt()
    return float(((M.double() - truth).abs() / torch.outer(norms, norms)).max())


def close(grads: Lists) -> Tensor:
    """STYLE's rule: at most twice the error of the same product in plain torch."""
    dtype = next(g.dtype for g in grads[0] if g is not None)
    G = rows(grads)
    truth = G @ G.T
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = rows(grads, wide)
    # A float64 matmul is the truth itself, so float64 is held to the bound of a sum in two levels.
    steps = BLOCK // 8 + CHUNK // BLOCK if dtype == torch.float64 else 1
    floor = steps * torch.finfo(wide).eps / 2
    M = ops.gram(grads)
    assert M.dtype == torch.float64
    assert torch.equal(M, M.T)
    assert relative_error(M, truth) <= 2 * max(relative_error(plain @ plain.T, truth), floor)
    return M


def on(target: int, grads: Lists, threads: int) -> list[list[float]]:
    return _C.products(*cpu.tables(grads).grads, threads, target).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 12, 32])
def test_against_float64(m, dtype):
    close(gradients(m, dtype, SHAPES if m <= 8 else SHAPES[:-1]))


def test_hundreds_of_tensors():
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(0, 900, (400,), generator=generator).tolist()
    close(gradients(3, torch.bfloat16, [(n,) for n in sizes]))


def test_missing_gradients_are_zeros_to_the_bit():
    grads = gradients(5, torch.float32)
    zeroed = [list(one) for one in grads]
    absent = [list(one) for one in grads]
    for i, k in [(0, 1), (1, 1), (2, 9), (4, 9), (0, 11), (1, 11), (2, 11), (3, 11)]:
        zeroed[i][k] = torch.zeros_like(grads[i][k])
        absent[i][k] = None
    assert torch.equal(ops.gram(absent), ops.gram(zeroed))
    close(absent)


def test_of_nothing():
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    for grads in ([[], []], [[None], [None]], [[torch.ones(0)], [None]]):
        assert torch.equal(ops.gram(grads), zeros)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views_and_other_layouts(dtype):
    grads = gradients(3, dtype, [(2 * CHUNK + 14,), (40, 30), (6, 5, 4)])
    moved = [
        [
            torch.cat([one[0][:1], one[0]])[1:],
            one[1].t().contiguous().t(),
            one[2].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        ]
        for one in grads
    ]
    assert moved[0][0].data_ptr() % 16 == moved[0][0].element_size()
    close(moved)
    alone = [[one[0]] for one in grads]
    assert torch.equal(ops.gram([[one[0]] for one in moved]), ops.gram(alone))


def test_mixed_dtypes_in_one_model():
    columns = [gradients(2, dtype, [(1001,)], seed=k) for k, dtype in enumerate(DTYPES)]
    grads = [[column[i][0] for column in columns] for i in range(2)]
    G = rows(grads)
    torch.testing.assert_close(ops.gram(grads), G @ G.T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 4, 7, 12])
def test_same_bits_for_any_thread_count_and_target(m, dtype):
    grads = gradients(m, dtype)
    grads[m - 1][5] = None
    first = on(0, grads, 1)
    for target in TARGETS:
        for threads in (1, 2, 3, 8):
            assert on(target, grads, threads) == first


def test_threads_follow_torch(monkeypatch):
    seen = []
    monkeypatch.setattr(_C, "products", lambda *a: seen.append(a[3]) or np.zeros((12, 1, 1)))
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        ops.gram(gradients(1, torch.float32))
    assert seen == [1, 3]


def test_sums_over_thousands_of_tensors_are_beyond_float32():
    # 4096^2 + 1 is no float32.
    grads = [[torch.tensor([4096.0]), *[torch.ones(1)] * 2999]]
    assert ops.gram(grads).item() == 2.0**24 + 2999


def test_fresh_memory_does_not_leak_into_the_result():
    script = (
        "import torch; from raco_fast.backends import choose, ops\n"
        "g = torch.Generator().manual_seed(1)\n"
        "x = [[torch.randn(n, generator=g).to(d) for n in (70000, 513, 7) "
        "for d in (torch.float32, torch.bfloat16)] for _ in range(5)]\n"
        "with choose.backend('cpu'): M = ops.gram(x).tolist()\n"
    )
    here: dict = {}
    exec(script, here)
    # glibc fills every byte that malloc returns with 0xfe.
    environment = {**os.environ, "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script + "print(M)"]
    there = subprocess.run(command, check=True, capture_output=True, env=environment, text=True)
    assert there.stdout.strip() == str(here["M"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_show(bad, dtype):
    grads = gradients(2, dtype)
    grads[1][11][CHUNK + 3] = bad
    M = ops.gram(grads)
    assert torch.isfinite(M[0, 0])
    assert not torch.isfinite(M[1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": np.zeros((33, 1), np.int64)}, "1 <= m <= 32"),
        ({"lengths": np.array([-1])}, "lengths must be >= 0"),
        ({"lengths": np.array([1, 2])}, r"lengths must be \[n\]"),
        ({"dtypes": np.array([4], np.uint8)}, "dtypes must be codes of DTYPES"),
        ({"threads": 0}, "threads must be >= 1"),
        ({"target": len(_C.CPU_TARGETS)}, "target must index CPU_TARGETS"),
    ],
)
def test_the_extension_checks_its_tables(change, message):
    good = {
        "grads": np.zeros((1, 1), np.int64),
        "lengths": np.array([5]),
        "dtypes": np.array([0], np.uint8),
        "threads": 1,
    }
    assert _C.products(**good).tolist() == [[[0.0]]]
    with pytest.raises(ValueError, match=message):
        _C.products(**{**good, **change})
