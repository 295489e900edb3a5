"""Gradients that are compared in bundles, or in pieces, differ by what each differs by itself."""

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ObjectiveGradients
from raco_fast.engine import deviations, spot_check
from raco_fast.engine.deviations import Bundles, of_combinations, on_host

SHAPES = [(16,), (4, 8), (1,), (3, 5, 2), (40, 3)]
R = torch.tensor([0.7, -1.3, 40.0], dtype=torch.float64)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("together", [1 << 20, 7])
@pytest.mark.parametrize("several", [True, False])
def test_every_parameter_has_its_own_deviation(monkeypatch, dtype, together, several):
    monkeypatch.setitem(deviations._TOGETHER, "cpu", together)
    found: list[Tensor | None] = [randn(3, *s, seed=k).to(dtype) for k, s in enumerate(SHAPES)]
    expected = [randn(*s, seed=9 + k).to(dtype) for k, s in enumerate(SHAPES)]
    expected[3] = expected[3].mT.contiguous().mT  # in another order
    found[1] = None  # which no layer has touched
    if several:
        differences, sizes = of_combinations(R, found, expected)
    else:
        of_each = [of_combinations(R, [g], [e]) for g, e in zip(found, expected, strict=True)]
        differences, sizes = ([x for one in of_each for x in one[k]] for k in (0, 1))
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for g, e, difference, size in zip(found, expected, differences, sizes, strict=True):
        g = torch.zeros(3, *e.shape) if g is None else g
        terms = R.view(-1, *[1] * e.ndim) * g.double()
        assert difference == pytest.approx(float((terms.sum(0) - e.double()).norm()), rel=20 * eps)
        assert size == pytest.approx(float(terms.norm()), rel=20 * eps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_own_parameter_only(value):
    found = [randn(3, *shape, seed=k) for k, shape in enumerate(SHAPES)]
    expected = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    found[1][2, 0, 3] = value
    sums = torch.tensor(of_combinations(R, found, expected)).sum(0)
    assert sums.isfinite().tolist() == [k != 1 for k in range(len(SHAPES))]


def test_bundles_are_of_one_dtype_and_no_larger_than_they_may_be(monkeypatch):
    monkeypatch.setitem(deviations._TOGETHER, "cpu", 40)
    sizes = [16, 0, 16, 7, 50, 30, 5]
    dtypes = [torch.float32] * 3 + [torch.float64] + [torch.float32] * 3
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    taken: list[list[int]] = []

    def take(params: list[Tensor], grads: list[Tensor]) -> None:
        assert all(p is g for p, g in zip(params, grads, strict=True))
        taken.append([p.numel() for p in params])

    bundles = Bundles(take)
    for t in tensors:
        bundles.add(t, t)
    bundles.finish()
    bundles.finish()
    assert taken == [[50], [16, 16, 30], [7], [5]]


def test_numbers_of_several_dtypes_are_read_in_their_order():
    numbers = [
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(2.0),
        torch.tensor(3.0).double(),
    ]
    assert on_host(numbers).tolist() == [0.1, 2.0, 3.0]


class Scorer(nn.Module):
    def __init__(self, reordered: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 1)
        self.reordered = reordered

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h.flip(0) if self.reordered else h)[:, 0]


@pytest.mark.parametrize(("together", "bundles"), [(1 << 20, [4]), (30, [1, 3]), (1, [1] * 4)])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_check_is_the_same_in_bundles_of_any_size(monkeypatch, together, bundles, wrong):
    """By one call of autograd, and by hooks that free a gradient when it has been compared."""
    monkeypatch.setitem(deviations._TOGETHER, "cpu", together)
    compared: list[int] = []

    def look(r: Tensor, found: list[Tensor], expected: list[Tensor]) -> object:
        compared.append(len(expected))
        return of_combinations(r, found, expected)

    monkeypatch.setattr(spot_check, "of_combinations", look)
    model = Scorer(reordered=wrong)
    raco_fast.prepare(model, strict=True)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    scores = model(randn(4, 6, seed=3).float())
    losses = [scores.sin().sum(), scores.square().sum()]
    if wrong:
        with pytest.raises(ValueError, match="a score depends on rows of another sequence"):
            gradients.backward(losses, scores=scores)
        assert all(p.grad is None for p in model.parameters())
    else:
        gradients.backward(losses, scores=scores)
        assert all(None not in gradients.of(p).values() for p in model.parameters())
    assert compared == bundles
