"""The C++ loop that writes a layer's m gradients, and the products that it forms on the way."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from raco_fast import _C
from raco_fast.backends import choose, cpu, ops, reference
from raco_fast.backends import weight_grad as plain

ROWS, BOUNDS = 160, [0, 30, 30, 31, 160]
D_OUT, D_IN = 85, 1024  # more than a chunk of the Gram's sum, and a last one that is not whole
GROUPS = len(BOUNDS) - 1
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
    "bfloat16 rows": (torch.bfloat16, torch.float32),
}


@pytest.fixture(autouse=True)
def cpu_backend():
    with choose.backend("cpu"):
        yield


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(m: int, rows: torch.dtype, out: torch.dtype, d_in: int = D_IN):
    x, dy = randn(ROWS, d_in, seed=1, dtype=rows), randn(ROWS, D_OUT, seed=2, dtype=rows)
    return x, dy, randn(m, GROUPS, seed=3), randn(m, D_OUT, d_in, seed=4, dtype=out)


def exact(x: Tensor, dy: Tensor, U: Tensor) -> Tensor:
    t = [dy[a:b].double().T @ x[a:b].double() for a, b in pairwise(BOUNDS)]
    return torch.einsum("ig,g...->i...", U, torch.stack(t))


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "added"])
@pytest.mark.parametrize(("rows", "dtype"), DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m", [2, 3, 5, 8])
def test_gradients_and_their_products(monkeypatch, m, rows, dtype, fresh):
    x, dy, U, before = layer(m, rows, dtype)
    truth = exact(x, dy, U) + (0 if fresh else before.double())
    theirs = before.clone()
    reference.weight_grad(x, dy, BOUNDS, U, theirs, fresh)
    error = (theirs.double() - truth).norm()
    found = []
    # One block, blocks that end with a chunk, and blocks that are too small to.
    for block_bytes in (1 << 30, 4 * GROUPS * D_IN * 40, 4 * GROUPS * D_IN * 3):
        monkeypatch.setattr(plain, "_BLOCK_BYTES", block_bytes)
        out, version = before.clone(), before._version
        M = ops.weight_grad(x, dy, BOUNDS, U, out, fresh, products=True)
        assert out._version > version
        assert (out.double() - truth).norm() <= 2 * error + GROUPS * 2.0**-53 * truth.norm()
        assert (M is None) == (block_bytes < 1 << 16)
        if M is not None:
            assert torch.equal(M, ops.products([[g] for g in out])[0])
        found.append(out)
    assert torch.equal(found[0], found[1])
    out = before.clone()
    assert ops.weight_grad(x, dy, BOUNDS, U, out, fresh) is None  # where nobody asks
    assert torch.equal(out, found[2])


@pytest.mark.parametrize("m", [2, 4, 7])
def test_same_bits_for_any_thread_count_and_target(m):
    groups, n = 3, 40 * 16384 + 77
    t, U = randn(groups, n, seed=1, dtype=torch.float32), randn(m, groups, seed=2).numpy()
    found = []
    for target in range(len(_C.CPU_TARGETS)):
        for threads in (1, 3):
            out, sums = torch.full((m, n), torch.nan), np.zeros((m, m))
            at = np.array([g.data_ptr() for g in out])
            _C.fold(t.data_ptr(), n, U, at, 0, True, sums, threads, target)
            found.append((out, sums.tolist()))
    for out, sums in found[1:]:
        assert torch.equal(out, found[0][0])
        assert sums == found[0][1]


def test_plain_torch_has_no_products_on_the_way():
    x, dy, U, out = layer(2, torch.float32, torch.float32)
    assert ops.weight_grad(x, dy, BOUNDS, U[:1], out[:1], True, products=True) is None
    with choose.backend("reference"):
        assert ops.weight_grad(x, dy, BOUNDS, U, out, True, products=True) is None


@pytest.mark.parametrize("wide", [torch.zeros(2, D_OUT, 2 * D_IN), torch.zeros(2, D_OUT, D_IN)])
def test_what_the_loop_does_not_take_is_for_plain_torch(wide):
    """Gradients that lie with gaps, and float32 ones of float64 rows."""
    x, dy, U, _ = layer(2, torch.float64 if wide.shape[2] == D_IN else torch.float32, wide.dtype)
    target = wide[:, :, :: wide.shape[2] // D_IN]
    assert ops.weight_grad(x, dy, BOUNDS, U, target, True, products=True) is None
    torch.testing.assert_close(target.double(), exact(x, dy, U), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"U": np.zeros((33, 1))}, "1 <= m <= 32"),
        ({"n": -1}, "n must be >= 0"),
        ({"out": np.zeros(2, np.int64)}, r"out must be \[m\]"),
        ({"dtype": 4}, "dtype must be a code of DTYPES"),
        ({"sums": np.zeros((2, 2))}, r"sums must be \[m, m\]"),
        ({"threads": 0}, "threads must be >= 1"),
    ],
)
def test_the_extension_checks_its_arguments(change, message):
    good = {"t": 0, "n": 0, "U": np.zeros((1, 1)), "out": np.zeros(1, np.int64), "dtype": 0}
    good |= {"fresh": True, "sums": np.zeros((1, 1)), "threads": 1}
    _C.fold(**good)
    with pytest.raises(ValueError, match=message):
        _C.fold(**{**good, **change})


def test_products_are_of_each_tensor_alone():
    sizes = (5, 3, 70001)
    grads = [[randn(n, seed=i + n, dtype=torch.float32) for n in sizes] for i in (0, 7)]
    for backend in (cpu, reference):
        together = backend.products(grads, {})
        for k in range(3):
            assert torch.equal(backend.products([[one[k]] for one in grads], {})[0], together[k])
        assert torch.equal(backend.gram(grads, {}), (together[0] + together[1]) + together[2])
