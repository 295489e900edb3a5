"""Rows that two sequences share, as a prompt's rows are shared by both responses to it."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import raco_fast
from raco_fast import ObjectiveGradients, combine, gram_first
from raco_fast.engine.declaration import Declared, declared, sequences
from raco_fast.engine.sequences import Factored
from raco_fast.engine.tap import NotExactError

D = 5
PROMPTS, A_ROWS, B_ROWS = (3, 1, 2), (2, 4, 1), (3, 1, 1)
PAIRS = len(PROMPTS)
WEIGHTS = [0.2, 0.3, 0.5]


def rows_of(pairs: range) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, sequence, shared_with) of [prompt | a | b] of pairs: scores a, then scores b."""
    index, second, inputs = [], [], []
    n = len(pairs)
    for k, pair in enumerate(pairs):
        for count, first, other in (
            (PROMPTS[pair], k, n + k),
            (A_ROWS[pair], k, -1),
            (B_ROWS[pair], n + k, -1),
        ):
            index += [first] * count
            second += [other] * count
        length = PROMPTS[pair] + A_ROWS[pair] + B_ROWS[pair]
        draw = torch.Generator().manual_seed(pair)
        inputs.append(torch.randn(length, D, generator=draw))
    return torch.cat(inputs), torch.tensor(index), torch.tensor(second)


class Model(nn.Module):
    """Scores of pairs whose responses see the mean of their prompt's rows.

    Args:
        leak: how much of the first row of all the last score sees besides.
    """

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.last, self.leak = nn.Linear(D, 1), leak

    def forward(self, x: Tensor, index: Tensor, second: Tensor, declared: bool = True) -> Tensor:
        n = int(torch.maximum(index, second).max()) + 1
        x, shared = x.to(self.first.weight), second >= 0
        with sequences(index, shared_with=second if declared else None):
            h = self.first(x).tanh()
            sums = h.new_zeros(n, D).index_add(0, index[shared], h[shared])
            sums = sums.index_add(0, second[shared], h[shared])
            h = torch.where(shared[:, None], h, h * sums[index])
            y = self.last(self.second(h).tanh())[:, 0]
        scores = y.new_zeros(n).index_add(0, index, y)
        scores = scores.index_add(0, second[shared], y[shared])
        if self.leak:
            scores = scores + self.leak * h[0].sum() * nn.functional.one_hot(
                torch.tensor(n - 1), n
            ).to(scores)
        return scores.sin()


def margins_of(scores: Tensor) -> Tensor:
    a, b = scores.chunk(2)
    return a - b


def of_pairs(scores: Tensor) -> list[Tensor]:
    """Three objectives that do not agree, functions of the margins."""
    margins = margins_of(scores)
    labels = margins.new_tensor([[1.0, -1.0, 1.0], [1.0, 1.0, 0.0], [-1.0, 1.0, 1.0]])
    labels = labels[:, : len(margins)]
    return [nn.functional.softplus(-(1 + i) * x * margins).sum() for i, x in enumerate(labels)]


def of_one_response(scores: Tensor) -> list[Tensor]:
    """No function of a margin: the last objective looks at a alone."""
    return [*of_pairs(scores)[:2], scores.chunk(2)[0].square().sum()]


def autograd(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    each = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    return {n: torch.stack(g) for n, g in zip(named, zip(*each, strict=True), strict=True)}


def held(gradients: ObjectiveGradients, model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.stack(list(gradients.of(p).values())) for n, p in model.named_parameters()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, truth in expected.items():
        torch.testing.assert_close(found[name], truth, rtol=1e-5, atol=1e-6, msg=lambda m: m)


def test_rows_of_a_pair_take_one_pass_that_every_check_finds_right():
    model, rows = Model(), rows_of(range(PAIRS))
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    with raco_fast.prepare(model, strict=True, check_every=1):
        for _ in range(2):
            scores = model(*rows)
            losses = of_pairs(scores)
            expected = autograd(model, losses)
            gradients.zero()
            gradients.backward(losses, scores=scores)
            assert_close(held(gradients, model), expected)


def test_a_response_that_nobody_looks_at_leaves_the_prompt_to_the_other():
    model, rows = Model(), rows_of(range(PAIRS))
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    with raco_fast.prepare(model, strict=True, check_every=1):
        scores = model(*rows)
        a = scores.chunk(2)[0]
        losses = [a.square().sum(), (a * torch.arange(PAIRS)).sum(), a[0] - a[1]]
        expected = autograd(model, losses)
        gradients.backward(losses, scores=scores)
        assert_close(held(gradients, model), expected)


def test_losses_that_do_not_see_a_pair_take_one_pass_each_and_it_is_said():
    model, rows = Model(), rows_of(range(PAIRS))
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    with raco_fast.prepare(model):
        scores = model(*rows)
        losses = of_one_response(scores)
        expected = autograd(model, losses)
        said = "sequences 0 and 3 share rows, and the losses do not see .* one pass per objective"
        with pytest.warns(UserWarning, match=said):
            gradients.backward(losses, scores=scores)
        assert_close(held(gradients, model), expected)
        # The losses of a later step may be other ones.
        gradients.zero()
        scores = model(*rows)
        expected = autograd(model, of_pairs(scores))
        gradients.backward(of_pairs(scores), scores=scores)
        assert_close(held(gradients, model), expected)


def test_strict_refuses_losses_that_do_not_see_a_pair():
    model, rows = Model(), rows_of(range(PAIRS))
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    with raco_fast.prepare(model, strict=True):
        scores = model(*rows)
        with pytest.raises(NotExactError, match="sequences 0 and 3 share rows"):
            gradients.backward(of_one_response(scores), scores=scores)


@pytest.mark.parametrize(
    ("model", "declared"),
    [(Model(leak=0.7), True), (Model(), False)],
    ids=["a row reaches a third score", "sharing is not declared"],
)
def test_a_spot_check_finds_rows_that_reach_other_scores(model, declared):
    """Undeclared, the rows of a prompt count as a's, which shows where b has no seed or another."""
    rows = rows_of(range(PAIRS))
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    with raco_fast.prepare(model):
        scores = model(*rows, declared)
        losses = of_pairs(scores) if declared else of_one_response(scores)
        expected = autograd(model, losses)
        with pytest.warns(UserWarning, match="a score depends on rows of another sequence"):
            gradients.backward(losses, scores=scores)
        assert_close(held(gradients, model), expected)


@pytest.mark.parametrize("keep_dy", [False, True])
def test_gram_first_on_shared_rows(keep_dy):
    model, rows = Model(), rows_of(range(PAIRS))
    oracle = copy.deepcopy(model).double()
    truth = ObjectiveGradients(oracle.parameters(), WEIGHTS)
    truth.backward(of_pairs(oracle(*rows)))
    expected = combine(truth, c=0.5)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    with raco_fast.prepare(model, strict=True, check_every=1):
        scores = model(*rows)
        found = gram_first(gradients, of_pairs(scores), scores, c=0.5, keep_dy=keep_dy)
    norms = expected.gram.diagonal().sqrt()
    assert float(((found.gram - expected.gram) / norms / norms[:, None]).abs().max()) < 1e-6
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        assert (p.grad.double() - q.grad).norm() <= 1e-5 * q.grad.norm()


def test_gram_first_where_losses_do_not_see_a_pair():
    model, rows = Model(), rows_of(range(PAIRS))
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    oracle = copy.deepcopy(model).double()
    truth = ObjectiveGradients(oracle.parameters(), WEIGHTS)
    truth.backward(of_one_response(oracle(*rows)))
    expected = combine(truth, c=0.5)
    with raco_fast.prepare(model):
        scores = model(*rows)
        with pytest.warns(UserWarning, match="sequences 0 and 3 share rows"):
            found = gram_first(gradients, of_one_response(scores), scores, c=0.5)
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 2, 3), (0, 1, 2, 3)])
def test_bins_add_up_to_one(cuts):
    model = Model().double()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    whole = autograd(model, of_pairs(model(*rows_of(range(PAIRS)))))
    labels = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, 0.0], [-1.0, 1.0, 1.0]]).double()
    with raco_fast.prepare(model, strict=True, check_every=1):
        for start, stop in pairwise(cuts):
            scores = model(*rows_of(range(start, stop)))
            margins = margins_of(scores)
            losses = [
                nn.functional.softplus(-(1 + i) * x[start:stop] * margins).sum()
                for i, x in enumerate(labels)
            ]
            gradients.backward(losses, scores=scores)
    for name, g in held(gradients, model).items():
        torch.testing.assert_close(g, whole[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_shows_in_its_gradient(bad):
    """And not as losses that see no pair."""
    model, rows = Model(), rows_of(range(PAIRS))
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    with raco_fast.prepare(model, strict=True):
        scores = model(*rows)
        losses = of_pairs(scores)
        losses[1] = losses[1] * bad
        gradients.backward(losses, scores=scores)
    assert all(not bool(g[1].isfinite().all()) for g in held(gradients, model).values())


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ([1, -1], "3 rows of `index`, got 2 from -1"),
        ([1, -2, 0], "3 rows of `index`, got 3 from -2"),
        ([], "3 rows of `index`, got 0 from -1"),
    ],
)
def test_a_second_sequence_that_is_none_is_refused(second, told):
    with (
        pytest.raises(ValueError, match=f"`shared_with` must hold .* {told}; give -1 to rows"),
        sequences([0, 1, 0], shared_with=second),
    ):
        pass


def test_a_second_sequence_without_a_score_is_refused():
    model, (x, index, second) = Model(), rows_of(range(PAIRS))
    with raco_fast.prepare(model):
        scores = model(x, index, second)[:-1]
        gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
        with pytest.raises(ValueError, match="declared sequence 5, but there are 5 `scores`"):
            gradients.backward([scores.sum()] * 3, scores=scores)


def test_what_is_declared_of_rows():
    both = Declared(torch.tensor([0, 0, 1, 2]), torch.tensor([2, -1, -1, 3]))
    assert (len(both), both.largest, both.pairs) == (4, 3, [(0, 2), (2, 3)])
    assert both.of_rows(torch.tensor([-1, 4, 5, 6])).tolist() == [5, -1, 4, 6]
    with sequences([0, 1], shared_with=[-1, -1]):
        assert declared().shared_with is None  # as rows of one sequence are


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([0.0, 2e-7, 1e-6])
)
def test_what_rounding_makes_of_a_pair_is_one_group_and_nothing_else_is_touched(m, n, seed, noise):
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=draw, dtype=torch.float64)
    A *= torch.rand(m, n, generator=draw) < 0.8
    scale = -(0.1 + torch.rand(n, generator=draw, dtype=torch.float64))
    rounded = A * scale * (1 + noise * (torch.rand(m, n, generator=draw) - 0.5))
    columns, pairs = torch.cat([A, rounded], 1), [(k, n + k) for k in range(n)]
    factored = Factored.of(columns, pairs)
    assert factored.apart(pairs) is None
    assert torch.equal(factored.group[:n], factored.group[n:])
    wide = torch.cat([factored.coefficients, A.new_zeros(m, 1)], 1)
    product = wide[:, factored.group] * factored.seeds
    torch.testing.assert_close(product, columns, rtol=3e-6, atol=0)


def test_another_direction_is_no_rounding():
    A = torch.tensor([[1.0, -1.0], [1e-6, -1.1e-6]])
    assert Factored.of(A, [(0, 1)]).apart([(0, 1)]) == (0, 1)
    assert Factored.of(A[:, :1].repeat(1, 2), [(0, 1)]).apart([(0, 1)]) is None
