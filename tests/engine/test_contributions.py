"""What one use of a parameter gives, against dense float64 formulas."""

import pytest
import torch
from torch import Tensor

from raco_fast.backends import weight_grad
from raco_fast.engine import between_uses, contributions, inner_products
from raco_fast.engine.between_uses import cross
from raco_fast.engine.contributions import (
    LookupUse,
    MatrixUse,
    ThinUse,
    vector_use_of_arranged,
)
from raco_fast.engine.sequences import ALL_ROWS, Segments

GROUPED = Segments(7, None, (0, 2, 2, 5, 7))  # the second group is empty
OF_ENTRIES = [0, 0, 2, 2, 2, 3, 3]
VOCAB = 9
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_group(rows: Tensor, segments: Segments) -> list[Tensor]:
    """The rows [entries, inner, d] of each group, float64 [n, d]."""
    bounds = zip(segments.offsets, segments.offsets[1:], strict=False)
    return [rows[start:stop].double().flatten(0, 1) for start, stop in bounds]


class Case:
    """A use, the t_g it stands for (float64 [groups, *shape]), and what torch makes of them."""

    def __init__(self, kind: str, inner: int, dtype: torch.dtype, seed: int = 0) -> None:
        entries, d = GROUPED.entries, 5
        self.dy = randn(entries, inner, VOCAB, seed=seed, dtype=dtype)
        self.x = randn(entries, inner, d, seed=seed + 1, dtype=dtype)
        self.ids = torch.randint(
            0, VOCAB - 2, (entries, inner, 1), generator=torch.Generator().manual_seed(seed + 2)
        )
        self.kind = kind
        self.t = torch.stack(
            [
                self.of_rows(*rows)
                for rows in zip(
                    *(by_group(part, GROUPED) for part in (self.dy, self.x, self.ids)), strict=True
                )
            ]
        )
        self.parameter = torch.empty(self.t.shape[1:], dtype=dtype)

    def of_rows(self, dy: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        if self.kind == "matrix":
            return dy.T @ x
        if self.kind == "vector":
            return dy.sum(0)
        kept = (ids != 3).to(x)  # the padding id
        return x.new_zeros(VOCAB, x.shape[1]).index_add(0, ids[:, 0].long(), 1.5 * x * kept)

    def use(self, segments: Segments = GROUPED):
        dy, x, ids = (segments.arranged(part) for part in (self.dy, self.x, self.ids))
        if self.kind == "matrix":
            return MatrixUse(x, dy, segments)
        if self.kind == "vector":
            return vector_use_of_arranged(dy, segments)
        return LookupUse(ids, x, segments, 1.5, 3)

    def by_torch(self, U: Tensor) -> Tensor:
        """Objective by objective in the tensors' own dtype, as autograd would."""
        scales = U.to(self.dy)[:, OF_ENTRIES][:, :, None, None]
        return torch.stack(
            [
                self.of_rows(
                    (self.dy * scale).flatten(0, 1),
                    (self.x * scale if self.kind == "lookup" else self.x).flatten(0, 1),
                    self.ids.flatten(0, 1).to(self.x.dtype),
                )
                for scale in scales
            ]
        )


def assert_as_good_as(plain: Tensor, found: Tensor, truth: Tensor) -> None:
    """Error at most twice that of plain torch, which may be lucky to the last bit."""
    error, theirs = ((g.double() - truth).norm() for g in (found, plain))
    assert error <= 2 * theirs + torch.finfo(plain.dtype).eps * truth.norm() / 4


def spied(monkeypatch, name: str, where: object = weight_grad) -> list[str]:
    """Calls of a function, or of a method of MatrixUse."""
    calls, function = [], getattr(where, name)

    def spy(*args):
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(where, name, spy)
    return calls


U = randn(3, 4, seed=9)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["matrix", "vector", "lookup"])
@pytest.mark.parametrize("inner", [1, 20], ids=["few rows", "many rows"])
def test_gradients_of_all_objectives(kind, inner, dtype):
    case = Case(kind, inner, dtype)
    truth = torch.einsum("ig,g...->i...", U, case.t)
    plain = case.by_torch(U)
    out = torch.full_like(plain, torch.nan)
    case.use().add_to(out, U, fresh=True)
    assert_as_good_as(plain, out, truth)
    before = randn(*plain.shape, seed=5, dtype=dtype)
    out = before.clone()
    case.use().add_to(out, U, fresh=False)
    assert_as_good_as(plain + before, out, truth + before.double())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["matrix", "vector", "lookup"])
def test_without_coefficients_it_is_the_ordinary_gradient(kind, dtype):
    case = Case(kind, 3, dtype)
    plain = case.by_torch(torch.ones(1, 4))
    out = torch.full_like(plain, torch.nan)
    case.use(ALL_ROWS).add_to(out, None, fresh=True)
    assert_as_good_as(plain, out, case.t.sum(0, keepdim=True))


@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 23])
@pytest.mark.parametrize("kind", ["matrix", "vector", "lookup"])
@pytest.mark.parametrize("inner", [1, 20], ids=["few rows", "many rows"])
def test_inner_products_of_groups(monkeypatch, kind, inner, block_bytes):
    monkeypatch.setattr(weight_grad, "_BLOCK_BYTES", block_bytes)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        case = Case(kind, inner, dtype)
        K, t = case.use().gram(), case.t.flatten(1)
        assert K.dtype == torch.float64
        norms = t.norm(dim=1)
        assert bool(((K - t @ t.T).abs() <= tolerance * norms[:, None] * norms).all())


@pytest.mark.parametrize("n", [1, inner_products._RUN - 1, inner_products._RUN, 400_003])
def test_long_rows_cost_no_accuracy(n):
    # Roundings one after another walk this far, if chance leads them, on the slowest way to add.
    far = inner_products._RUN**0.5 * torch.finfo(torch.float32).eps / 2
    a, b = randn(2, 3, n, seed=4, dtype=torch.float32) + 0.1
    for K, (x, y) in (
        (inner_products.products(a), (a, a)),
        (inner_products.products(a, b), (a, b)),
    ):
        x, y = x.double(), y.double()
        assert K.dtype == torch.float64
        size = x.norm(dim=1)[:, None] * y.norm(dim=1)
        assert ((K - x @ y.T).abs() / size).max() <= far


@pytest.mark.parametrize(
    ("m", "inner", "by_groups"), [(1, 20, False), (2, 1, False), (2, 20, True), (3, 20, True)]
)
def test_one_product_per_group_where_that_is_cheaper_else_scaled_rows(
    monkeypatch, m, inner, by_groups
):
    case = Case("matrix", inner, torch.float64)
    formed, scaled = spied(monkeypatch, "of_groups"), spied(monkeypatch, "_add_scaled_rows")
    out = torch.empty(m, *case.parameter.shape, dtype=torch.float64)
    case.use().add_to(out, U[:m], fresh=True)
    assert (bool(formed), bool(scaled)) == (by_groups, not by_groups)
    torch.testing.assert_close(out, torch.einsum("ig,g...->i...", U[:m], case.t))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("block_bytes", [1, 300])
def test_blocks_of_a_large_weight(monkeypatch, dtype, block_bytes):
    monkeypatch.setattr(weight_grad, "_BLOCK_BYTES", block_bytes)
    case, formed = Case("matrix", 20, dtype), spied(monkeypatch, "of_groups")
    for fresh in (True, False):
        out = torch.ones_like(case.by_torch(U))
        case.use().add_to(out, U, fresh)
        truth = torch.einsum("ig,g...->i...", U, case.t) + (not fresh)
        assert_as_good_as(case.by_torch(U) + (not fresh), out, truth)
    assert len(formed) > 2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_that_lie_with_gaps(dtype):
    case, wide = Case("matrix", 20, dtype), torch.zeros(3, VOCAB, 2 * 5, dtype=dtype)
    for fresh in (True, False):
        case.use().add_to(wide[..., ::2], U, fresh)
    truth = 2 * torch.einsum("ig,g...->i...", U, case.t)
    assert_as_good_as(2 * case.by_torch(U), wide[..., ::2], truth)
    assert not wide[..., 1::2].any()


@pytest.mark.parametrize("d_out", [9, 29])
def test_products_come_from_token_pairs_where_that_is_smaller(monkeypatch, d_out):
    x, dy = randn(7, 1, 5, seed=1), randn(7, 1, d_out, seed=2)
    rows = zip(by_group(dy, GROUPED), by_group(x, GROUPED), strict=True)
    t = torch.stack([(dy.T @ x).flatten() for dy, x in rows])
    pairs = spied(monkeypatch, "_gram_of_token_pairs", MatrixUse)
    blocks = spied(monkeypatch, "of_groups", contributions)
    K = MatrixUse(x, dy, GROUPED).gram()
    ghost = 7 * (d_out + 5) < 2 * d_out * 5
    assert ghost == (d_out == 29)  # both sides of the limit are here
    assert (bool(pairs), bool(blocks)) == (ghost, not ghost)
    torch.testing.assert_close(K, t @ t.T)


@pytest.mark.parametrize("kind", ["matrix", "vector", "lookup"])
def test_some_rows_without_the_others(kind):
    case, ids = Case(kind, 3, torch.float64), torch.tensor([0, 2, 3, 8])
    torch.testing.assert_close(case.use().at(ids), case.t[:, ids])


@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lookup", "matrix"),
        ("matrix", "lookup"),
        ("lookup", "lookup"),
        ("matrix", "matrix"),
        ("vector", "vector"),
    ],
)
def test_products_between_two_uses_of_a_parameter(monkeypatch, first, second, rows):
    monkeypatch.setattr(between_uses, "_CROSS_ROWS", rows)
    a, b = Case(first, 3, torch.float64), Case(second, 2, torch.float64, seed=20)
    K = cross(a.use(), b.use(), a.parameter, 4)
    torch.testing.assert_close(K, a.t.flatten(1) @ b.t.flatten(1).T)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("kind", ["matrix", "vector", "lookup"])
def test_a_call_without_rows_adds_nothing(kind, groups):
    case, none = (
        Case(kind, 3, torch.float32),
        Segments(7, torch.tensor([], dtype=torch.int64), (0,) * (groups + 1)),
    )
    use, shape = case.use(none), case.parameter.shape
    for fresh in (True, False):
        out = torch.ones(3, *shape)
        use.add_to(out, torch.ones(3, groups), fresh)
        assert bool((out == (not fresh)).all())
    assert torch.equal(use.gram(), torch.zeros(groups, groups, dtype=torch.float64))
    assert use.at(torch.tensor([1, 4])).abs().sum() == 0
    K = cross(use, case.use(none), case.parameter, groups)
    assert torch.equal(K, torch.zeros(groups, groups, dtype=torch.float64))


PERMUTED = Segments(7, torch.tensor([4, 0, 6, 3, 1]), (0, 2, 2, 5))  # 2 and 5 belong to nobody


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("outer", [1, 2], ids=["rows", "heads before rows"])
@pytest.mark.parametrize("d_out", [3, 320], ids=["thin", "wide"])
def test_rows_of_a_layer_as_they_lie(monkeypatch, dtype, outer, d_out):
    """`matrix_use` and `vector_use` put nothing or everything in order, and get the same."""
    monkeypatch.setattr(contributions, "_FEW", 0)
    shape = (7, 6) if outer == 1 else (outer, 7, 3)
    segments = Segments(7, PERMUTED.order, PERMUTED.offsets, outer)
    x, dy = randn(*shape, 20, seed=1, dtype=dtype), randn(*shape, d_out, seed=2, dtype=dtype)
    of_group = [
        [part.movedim(outer - 1, 0)[entries].double().flatten(0, -2) for part in (x, dy)]
        for entries in ([4, 0], [], [6, 3, 1])
    ]
    matrices = torch.stack([b.T @ a for a, b in of_group])
    vectors = torch.stack([b.sum(0) for _, b in of_group])
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    matrix, vector = (
        contributions.matrix_use(x, dy, segments),
        contributions.vector_use(dy, segments),
    )
    assert isinstance(matrix, ThinUse) == (d_out == 320)
    for use, t in ((matrix, matrices), (vector, vectors)):
        gradients = torch.full((2, *t.shape[1:]), torch.nan, dtype=torch.float64)
        use.add_to(gradients, U[:2, :3], fresh=True)
        wide = {"rtol": 1e-5, "atol": 1e-4} if dtype != torch.float64 else tolerance
        torch.testing.assert_close(gradients, torch.einsum("ig,g...->i...", U[:2, :3], t), **wide)
        torch.testing.assert_close(use.gram(), t.flatten(1) @ t.flatten(1).T, **wide)
        ids = torch.tensor([0, 2])
        torch.testing.assert_close(use.at(ids).double(), t[:, ids], **wide)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "added"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("d_in", "d_out"), [(40, 4), (4, 40), (6, 10)], ids=["A", "B", "wide"])
def test_thin_matrices_of_rows_in_any_order(monkeypatch, d_in, d_out, dtype, fresh):
    """One product for all objectives, or rows put in order where that would be the larger one."""
    calls = spied(monkeypatch, "add_thin", contributions)
    x, dy = randn(1, 7, d_in, seed=1, dtype=dtype), randn(1, 7, d_out, seed=2, dtype=dtype)
    segments = Segments(7, PERMUTED.order, PERMUTED.offsets)
    of_rows = torch.zeros(3, 7, dtype=torch.float64)
    of_rows[:, PERMUTED.order] = U[:, :3][:, [0, 0, 2, 2, 2]]
    before = randn(3, d_out, d_in, seed=3, dtype=dtype)
    truth = torch.einsum("mr,ro,ri->moi", of_rows, dy[0].double(), x[0].double())
    plain = torch.stack([(dy[0] * u[:, None].to(dtype)).T @ x[0] for u in of_rows])
    if not fresh:
        truth, plain = truth + before.double(), plain + before
    found = torch.full_like(before, torch.nan) if fresh else before.clone()
    use = ThinUse(x, dy, segments)
    use.add_to(found, U[:, :3], fresh)
    assert len(calls) == (3 * min(d_in, d_out) <= max(d_in, d_out))
    if dtype == torch.float64:  # as fine as the truth
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    else:
        assert_as_good_as(plain, found, truth)
    again = torch.full_like(before, torch.nan) if fresh else before.clone()
    ThinUse(x, dy, segments).add_to(again, U[:, :3], fresh)
    assert torch.equal(found, again)
    t = torch.stack([dy[0, o].double().T @ x[0, o].double() for o in ([4, 0], [], [6, 3, 1])])
    torch.testing.assert_close(use.gram(), t.flatten(1) @ t.flatten(1).T, rtol=1e-4, atol=1e-4)
