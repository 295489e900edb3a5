"""What samples have with themselves: from one pass, against a backward pass for each of them."""

import pytest
import torch
from torch import Tensor, nn

from raco_fast.engine import contributions
from raco_fast.engine.backward import collect, one_backward, sensitivities
from raco_fast.engine.between_uses import cross, cross_within
from raco_fast.engine.contributions import (
    EntryUse,
    FactorsUse,
    LookupUse,
    MatrixUse,
    ThinUse,
    Use,
)
from raco_fast.engine.gram_collector import GramCollector
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.inner_products import products_within
from raco_fast.engine.prepare import prepare
from raco_fast.engine.sample_products import SampleProducts
from raco_fast.engine.sequences import Factored, Segments
from raco_fast.gradients.accumulation import Accumulation
from raco_fast.gradients.buffer_pool import HostMemory

NAMES = ("a", "b", "c")
SEGMENTS = Segments(7, torch.tensor([3, 0, 1, 6, 2, 5]), (0, 1, 1, 3, 6))  # entry 4 has no group


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def use_of(kind: str, inner: int) -> Use:
    x, dy = randn(7, inner, 24, seed=1), randn(7, inner, 40, seed=2)
    ids = torch.randint(0, 9, (7, inner, 1), generator=torch.Generator().manual_seed(3))
    if kind == "matrix":
        return MatrixUse(SEGMENTS.arranged(x), SEGMENTS.arranged(dy), SEGMENTS)
    if kind == "thin":
        return ThinUse(x, dy, SEGMENTS)
    if kind == "factors":
        return FactorsUse(x, dy, SEGMENTS)
    if kind == "entries":
        return EntryUse(dy.sum(1), SEGMENTS)
    return LookupUse(SEGMENTS.arranged(ids), SEGMENTS.arranged(dy), SEGMENTS, 1.5, 3)


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("inner", [2, 60], ids=["few rows", "many rows"])
@pytest.mark.parametrize("kind", ["matrix", "thin", "factors", "entries", "lookup"])
def test_blocks_of_the_products(kind, inner, each):
    use, U = use_of(kind, inner), randn(3, 4, seed=9).double()
    K = use.gram()
    expected = torch.stack([K[g : g + each, g : g + each] for g in range(0, 4, each)])
    shape = {"entries": (40,), "lookup": (9, 40)}.get(kind, (40, 24))
    for fresh in (True, False):
        plain = randn(3, *shape, seed=4)
        out = plain.clone()
        use_of(kind, inner).add_to(plain, U, fresh)
        found, _ = use.add_and_look(out, U, fresh, each)
        scale = K.diagonal().max()
        assert (found - expected).abs().max() <= 1e-6 * scale
        assert (use.within(each) - expected).abs().max() <= 1e-6 * scale
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


def test_t_is_formed_once_for_gradients_and_products(monkeypatch):
    formed = []
    own = contributions.products_within
    monkeypatch.setattr(
        contributions, "products_within", lambda t, each: formed.append(t.shape) or own(t, each)
    )
    use, out = use_of("matrix", 60), torch.empty(3, 40, 24)
    monkeypatch.setattr(MatrixUse, "_t", None)  # what would form them a second time
    use.add_and_look(out, randn(3, 4, seed=9).double(), True, 1)
    assert formed == [(4, 40 * 24)]


@pytest.mark.parametrize("each", [1, 2])
def test_between_two_uses(each):
    for kinds in (("matrix", "matrix"), ("lookup", "lookup")):
        a, b = use_of(kinds[0], 3), use_of(kinds[1], 5)
        p = torch.empty((9, 40) if kinds[0] == "lookup" else (40, 24))
        K, found = cross(a, b, p, 4), cross_within(a, b, p, 4, each)
        for s in range(4 // each):
            part = slice(s * each, (s + 1) * each)
            torch.testing.assert_close(found[s], K[part, part], rtol=1e-5, atol=1e-4)


def test_squares_of_long_rows():
    a = randn(3, 5000, seed=5)
    truth = a.double().square().sum(1)
    torch.testing.assert_close(products_within(a, 1)[:, 0, 0], truth, rtol=1e-6, atol=0)
    assert products_within(a[:0], 2).shape == (0, 2, 2)


@pytest.mark.parametrize("each", [1, 2], ids=["pairs", "scores of their own"])
def test_groups_parted_by_sample(each):
    A = randn(3, 8, seed=6).double()
    sample = torch.tensor([5, 2, 9, 7, 5, 2, 9, 7])
    if each == 1:
        A[:, 4:] = -A[:, :4]
    A[:, 3] = A[:, 7] = 0.0  # a pair that nobody has labelled
    A[:, 2] = 2 * A[:, 0]  # groups that a pass without samples would share
    if each == 1:
        A[:, 6] = -A[:, 2]
    A[:, 5] = A[:, 5] * (each == 1)  # a pair one of whose scores counts
    found = Factored.of(A).by_sample(sample)
    assert found.each == each
    of_scores = found.coefficients[:, found.group.clamp(min=0)] * found.seeds
    torch.testing.assert_close(torch.where(found.group >= 0, of_scores, 0.0), A)
    groups = found.group.tolist()
    for a in range(8):
        for b in range(8):
            if min(groups[a], groups[b]) >= 0:
                same = groups[a] // each == groups[b] // each
                assert same == bool(sample[a] == sample[b])


class Shared(nn.Module):
    """Embeddings that are tied to the head, a layer that is called twice, norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 32), nn.Embedding(6, 32)
        self.again = nn.Linear(32, 32)
        self.norm, self.rms = nn.LayerNorm(32), nn.RMSNorm(32)
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)
        self.head = nn.Linear(32, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.rms(torch.tanh(self.again(x)) + self.up(self.down(x)))
        logits = self.head(self.norm(self.again(x)))
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].sum(1)


def model_and_ids() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (8, 6), generator=torch.Generator().manual_seed(1))
    return Shared(), ids


def losses_of(scores: Tensor, of_pairs: bool) -> list[Tensor]:
    """Per sample they can be told apart: sums over 4 pairs (b, b + 4)."""
    signs = torch.tensor([[1.0, -1, 1, 0], [-1, -1, 0, 1], [1, 1, 1, -1]])
    if of_pairs:
        margins = (scores[:4] - scores[4:]) * signs
        return list((-nn.functional.logsigmoid(0.3 * margins) * signs.abs()).sum(1))
    both = scores[:4].sigmoid() * signs + (0.2 * scores[4:]).exp() * signs.roll(1, 1)
    return list(both.sum(1))


@pytest.mark.parametrize("of_pairs", [True, False], ids=["pairs", "two directions a pair"])
def test_a_model_with_every_kind_of_use(of_pairs):
    """Linear, thin, norm, bias, embedding, positions, a tied head and a shared layer."""
    model, ids = model_and_ids()
    truth_model = Shared().double()
    truth_model.load_state_dict(model.state_dict())
    parameters = list(truth_model.parameters())
    scores = truth_model(ids)
    A = sensitivities(losses_of(scores, of_pairs), scores)
    own = torch.zeros(3, 3, dtype=torch.float64)
    whole = torch.zeros(3, sum(p.numel() for p in parameters), dtype=torch.float64)
    for pair in range(4):
        rows = []
        for i in range(3):
            seeds = torch.zeros(8, dtype=torch.float64)
            seeds[[pair, pair + 4]] = A[i, [pair, pair + 4]]
            found = torch.autograd.grad(scores, parameters, seeds, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in found]))
        v = torch.stack(rows)
        own, whole = own + v @ v.T, whole + v
    prepare(model, strict=True)
    parameters = list(model.parameters())
    for way in ("one_backward", "gram"):
        scores = model(ids)
        losses = losses_of(scores, of_pairs)
        graph = ScoreGraph(dict(zip(NAMES, losses, strict=True)), scores, parameters, (), set())
        assert graph.obstacle is None
        assert len(graph.shared()) == 3  # words, and the weight and bias that are called twice
        A = sensitivities(losses, scores)
        factored = Factored.of(A).by_sample(torch.arange(4).repeat(2))
        assert factored.each == (1 if of_pairs else 2)
        if way == "gram":
            collector = GramCollector(factored, parameters, graph.shared())
            collect(collector.collect, graph, factored.seeds)
            collector.add_products_of_uses()
            found, gram = collector.sample_products()(), collector.gram()
        else:
            into = Accumulation(parameters, NAMES, HostMemory())
            samples = SampleProducts(factored, graph.shared())
            one_backward(graph, factored, into, samples=samples)
            into.store()
            flat = torch.cat([torch.stack(p.grad.buffers).flatten(1) for p in parameters], 1)
            found, gram = samples.products()(), (flat.double() @ flat.double().T)
        size = own.diagonal().max()
        assert (found - own).abs().max() <= 2e-6 * size, way
        assert (gram - whole @ whole.T).abs().max() <= 2e-6 * size * 4, way
