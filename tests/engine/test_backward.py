"""One backward pass against m of them, in float64, over architectures, layouts and dtypes."""

import re
import warnings
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ObjectiveGradients
from raco_fast.backends import choose, cpu, reference
from raco_fast.engine import contributions
from raco_fast.engine import declaration as engine_declaration


@pytest.fixture
def compare(lm):
    """A function that gives (found, truth): gradients of m objectives, one way and the other."""

    def run(model, layout, m: int = 3, batch=None, **options):
        batch = batch or lm.batch()

        def losses(model) -> list[Tensor]:
            return lm.losses(layout(model, batch), m, **options)

        truth = lm.in_float64(model, losses)
        gradients = ObjectiveGradients(lm.trained(model).values(), lm.weights(m))
        with raco_fast.prepare(model, strict=True):
            scores = layout(model, batch)
            gradients.backward(lm.losses(scores, m, **options), scores=scores)
        return lm.held(gradients, model), truth

    return run


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["full", "lora"])
def test_every_parameter_of_every_architecture(lm, family, layout, adapter, compare):
    found, truth = compare(lm.build(family, adapter=adapter), layout)
    assert len(truth) > 10
    assert max(lm.errors(found, truth).values()) <= 1e-5


@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize("adapter", [None, "saved"], ids=["full", "modules_to_save"])
def test_any_number_of_objectives(lm, layout, adapter, m, compare):
    model = lm.build("llama" if adapter else "llama, tied, biased", adapter=adapter)
    found, truth = compare(model, layout, m, without_pair=m // 2 if m > 1 else None)
    assert any("lm_head" in name for name in truth) == (adapter == "saved")
    assert max(lm.errors(found, truth).values()) <= 1e-5


def test_packed_sequences_are_what_padded_ones_are(lm, family):
    """Otherwise the tests of the packed layout would test another computation."""
    model, batch = lm.build(family).double(), lm.batch()
    torch.testing.assert_close(
        lm.packed(model, batch), lm.by_logits(model, batch), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["full", "lora"])
def test_bfloat16_is_at_most_twice_as_far_off_as_torch(lm, family, layout, adapter, compare):
    model = lm.build(family, torch.bfloat16, adapter)
    batch = lm.batch()
    plain = lm.by_autograd(model, lm.losses(layout(model, batch)))
    found, truth = compare(model, layout)
    ours, torchs = lm.errors(found, truth), lm.errors(plain, truth)
    for name, error in ours.items():
        assert error <= 2 * torchs[name], name


def test_objectives_that_have_nothing_in_this_batch(lm):
    model, batch = lm.build(), lm.batch()
    gradients = ObjectiveGradients(model.parameters(), {"a": 0.3, "b": 0.7})
    raco_fast.prepare(model, strict=True)
    for nothing in (lambda scores: 0.0 * scores.sum(), lambda scores: torch.tensor(1.0)):
        scores = lm.by_logits(model, batch)
        gradients.backward([0.0 * scores.sum(), nothing(scores)], scores=scores)
        gradients.collect()
        assert not any(g.any() for g in lm.held(gradients, model).values())
    scores = lm.by_logits(model, batch)
    gradients.backward([torch.tensor(1.0), scores.square().sum()], scores=scores)
    found = lm.held(gradients, model)
    assert all(not g[0].any() and g[1].any() for g in found.values())


@pytest.mark.parametrize("mode", ["autograd", "one_backward"])
def test_a_batch_without_any_label_gives_zeros(lm, mode):
    """As autograd does, for what the scores depend on; else AdamW would leave parameters alone."""
    model, batch = lm.build(), lm.batch()
    model.spare = nn.Linear(2, 2)
    raco_fast.prepare(model, strict=True)
    gradients = ObjectiveGradients(model.parameters(), {"a": 0.3, "b": 0.7})

    def backward(losses_of) -> dict[str, list[Tensor]]:
        scores = lm.by_logits(model, batch)
        losses = losses_of(scores)
        gradients.backward(losses, scores=scores, mode=mode)
        with pytest.raises(RuntimeError, match=r"an earlier backward pass has freed|second time"):
            gradients.backward(losses, scores=scores, mode=mode)
        found = {name: list(gradients.of(p).values()) for name, p in model.named_parameters()}
        for name in ("spare.weight", "spare.bias"):
            assert found.pop(name) == [None, None]
        return found

    nothing = backward(lambda scores: [0.0 * scores.sum(), 0.0 * scores.square().sum()])
    assert all(g is not None and not g.any() for both in nothing.values() for g in both)
    gradients.zero()
    before = backward(lambda scores: [scores.sum(), scores.square().sum()])
    before = {name: [g.clone() for g in both] for name, both in before.items()}
    after = backward(lambda scores: [0.0 * scores.sum(), 0.0 * scores.square().sum()])
    for name, both in after.items():
        assert all(map(torch.equal, both, before[name])), name


class PerToken(nn.Module):
    """A language model whose tokens do not meet, so that any packing is exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(17, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.up(self.norm(self.words(ids))).tanh())[..., 0]


IDS = torch.randint(0, 17, (3, 6), generator=torch.Generator().manual_seed(4))
LAYOUTS = {
    "a row": (IDS.reshape(1, 18), {"cu_seqlens": [0, 4, 4, 11, 16, 18]}),
    "no row": (IDS.reshape(18), {"cu_seqlens": torch.tensor([0, 4, 4, 11, 16, 18])}),
    "several rows": (IDS, {"index": [0] * 4 + [2] * 7 + [3] * 5 + [4] * 2}),
    "whole rows": (IDS, {"index": [4, 0, 2]}),
    "rows of a sequence apart": (IDS, {"index": torch.tensor([2, 0, 2])}),
    "one row for each": (IDS, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_declared_layout(layout):
    ids, declared = LAYOUTS[layout]
    model = PerToken().double()
    params = list(model.parameters())
    gradients = ObjectiveGradients(params, [0.2, 0.3, 0.5])

    def run(prepared: bool) -> tuple[list[Tensor], Tensor]:
        if declared is None:
            scores = model(ids).sum(-1)
        elif prepared:
            with raco_fast.sequences(**declared):
                rows = model(ids).flatten()
            scores = rows.new_zeros(5).index_add(0, of_token(), rows)
        else:
            scores = torch.zeros(5, dtype=torch.float64).index_add(
                0, of_token(), model(ids).flatten()
            )
        return [scores.sin().sum(), scores[:2].square().sum(), scores.cos().sum()], scores

    def of_token() -> Tensor:
        with raco_fast.sequences(**declared):
            index = engine_declaration.declared().index
        return index.repeat_interleave(ids.numel() // len(index))

    truth = [torch.autograd.grad(run(False)[0][i], params) for i in range(3)]
    with raco_fast.prepare(model, strict=True):
        losses, scores = run(True)
        gradients.backward(losses, scores=scores)
    for i, grads in enumerate(truth):
        for p, grad in zip(params, grads, strict=True):
            torch.testing.assert_close(gradients.of(p)[str(i)], grad)


def declared_wrongly(index=None, **kwargs):
    model = PerToken()
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    with raco_fast.sequences(index, **kwargs):
        scores = model(IDS).sum(-1)
    gradients.backward([scores.sum(), scores.square().sum()], scores=scores)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            {"index": [0, 1]},
            r"declared 2 rows, but the input of layer 'down' has shape \(3, 6, 24\)",
        ),
        ({"cu_seqlens": [0, 5, 17]}, r"declared 17 rows.*; give one index for each of its rows"),
        ({"index": [0, 1, 3]}, "declared sequence 3, but there are 3 `scores`; number them from 0"),
    ],
)
def test_a_declaration_that_does_not_fit(declared, message):
    with pytest.raises(ValueError, match=f"`sequences` {message}"):
        declared_wrongly(**declared)


def test_tokens_that_could_be_heads_are_refused():
    norm = nn.LayerNorm(4)
    raco_fast.prepare(norm)
    gradients = ObjectiveGradients(norm.parameters(), [0.4, 0.6])
    with raco_fast.sequences(cu_seqlens=[0, 2, 3]):
        rows = norm(torch.randn(1, 3, 3, 4)).square().sum((0, 1, 3))
    scores = torch.stack([rows[:2].sum(), rows[2]])
    with pytest.raises(ValueError, match=r"declared 3 rows, .* shape \(1, 3, 3, 4\)"):
        gradients.backward([scores.sum(), scores.square().sum()], scores=scores)


def test_wrong_scores():
    model = PerToken()
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    tokens = model(IDS)
    scores = tokens.sum(-1)
    losses = [scores.sum(), scores.square().sum()]
    with pytest.raises(TypeError, match=r"`scores` must be a tensor \[B\], got list"):
        gradients.backward(losses, scores=[1.0])
    with pytest.raises(ValueError, match=r"`scores` must have shape \[B\].* got \[3, 6\]; sum the"):
        gradients.backward(losses, scores=tokens)
    for without in (scores.detach(), torch.ones(3)):
        with pytest.raises(ValueError, match=r"`scores` must require grad: .* do not detach it"):
            gradients.backward(losses, scores=without)
    with pytest.raises(ValueError, match="`scores` must be given in mode 'one_backward'"):
        gradients.backward(losses, mode="one_backward")
    assert all(p.grad is None for p in model.parameters())


def test_scores_of_another_length_later_on():
    model = PerToken()
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    message = r"`scores` has 2 sequences, but the input of layer 'down' has shape \(3, 6, 24\)"
    for length, expected in ((3, 0), (2, 1), (2, 0)):
        gradients.zero()
        scores = model(IDS).sum(-1)[:length]
        losses = [scores.sum(), scores.square().sum()]
        params = list(model.parameters())
        truth = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            gradients.backward(losses, scores=scores)
        assert [bool(re.search(message, str(w.message))) for w in seen] == [True] * expected
        for p, *exact in zip(params, *truth, strict=True):
            torch.testing.assert_close(list(gradients.of(p).values()), exact)


@pytest.mark.parametrize("check_every", [1, None], ids=["checked", "not checked"])
def test_a_graph_serves_one_backward_pass(check_every):
    model = PerToken()
    raco_fast.prepare(model, check_every=check_every)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    scores = model(IDS).sum(-1)
    losses = [scores.sin().sum(), scores.square().sum()]
    gradients.backward(losses, scores=scores)
    with pytest.raises(
        RuntimeError, match=r"`scores` belong to a graph that .* run the model again"
    ):
        gradients.backward(losses, scores=scores)
    gradients.zero()
    scores = model(IDS).sum(-1)
    losses = [scores.sin().sum(), scores.square().sum()]
    losses[0].backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="`losses` belong to a graph that an earlier backward"):
        gradients.backward(losses, scores=scores)


def test_a_parameter_that_a_rule_no_longer_covers_is_noticed():
    model = PerToken()
    prepared = raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    scores = model(IDS).sum(-1)
    gradients.backward([scores.sum(), scores.square().sum()], scores=scores)
    prepared.remove()
    model.up.requires_grad_(False)
    raco_fast.prepare(model)
    model.up.requires_grad_(True)
    scores = model(IDS).sum(-1)
    with pytest.warns(UserWarning, match=r"parameter 'up.\w+' reaches the scores past every rule"):
        gradients.backward([scores.sum(), scores.square().sum()], scores=scores)


def test_one_pass_at_a_time():
    model = PerToken()
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    scores = model(IDS).sum(-1)
    losses = [scores.sum(), scores.square().sum()]

    def again(_: Tensor) -> None:
        gradients.backward(losses, scores=scores)

    scores.register_hook(again)
    with pytest.raises(RuntimeError, match="over several objectives is under way for these grad"):
        gradients.backward(losses, scores=scores)


def test_a_forced_backend_reaches_the_threads_of_autograd(monkeypatch):
    """On a GPU the backward pass runs in threads of its own, where context variables are unset."""
    model, asked, backward = PerToken(), [], torch.autograd.backward

    def in_a_thread(*args, **kwargs) -> None:
        thread = Thread(target=backward, args=args, kwargs=kwargs)
        thread.start()
        thread.join()

    def spied(x, dy, bounds, U, *rest):
        if U is not None:
            asked.append(choose._forced.get())
        return plain(x, dy, bounds, U, *rest)

    # No layer is so small that its t are held, or so thin that its rows are scaled.
    monkeypatch.setattr(contributions, "_FEW", 0)
    monkeypatch.setattr(contributions, "_THIN", 1 << 30)
    monkeypatch.setattr(torch.autograd, "backward", in_a_thread)
    plain = reference.weight_grad
    for module in (reference, cpu):
        monkeypatch.setattr(module, "weight_grad", spied)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    with raco_fast.prepare(model, strict=True, check_every=None):
        for name in ("reference", "cpu"):
            scores = model(IDS).sum(-1)
            with raco_fast.backend(name):
                gradients.backward([scores.sum(), scores.square().sum()], scores=scores)
    assert asked == ["reference"] * 2 + ["cpu"] * 2
