"""Scores of pairs, whole or with the tail of the longer response weighed, and their gradients."""

import math
from dataclasses import replace

import pytest
import torch

import raco_fast
from raco_fast.dpo.data.collation import PairBatch
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.losses.registry import LOSSES, make_loss
from raco_fast.dpo.run.batching import why_not_shared
from raco_fast.dpo.scoring import ReferenceLogps, pair_logps, score_pairs, tail_weights


@pytest.fixture
def pairs() -> list[EncodedPair]:
    generator = torch.Generator().manual_seed(5)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 32, (n,), generator=generator).tolist()

    lengths = [(3, 2, 6), (5, 4, 1), (1, 3, 3), (4, 1, 5)]
    labels = [{"x": 1, "y": -0.75}, {"x": -1, "y": -1}, {"x": 1, "y": 0}, {"x": -1, "y": 1}]
    return [
        EncodedPair(f"p{k}", ids(p), ids(a), ids(b), labels[k], {"x": 0.5 + k})
        for k, (p, a, b) in enumerate(lengths)
    ]


@pytest.fixture(params=["pairs", "packed", "padded"])
def batch(request, pairs) -> PairBatch:
    return batch_of(request.param, pairs)


def batch_of(kind: str, pairs: list[EncodedPair]) -> PairBatch:
    return Layout(kind, len(pairs), math.inf, 0).batch(pairs)


def token_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Of the response's tokens, from the model's own logits of this conversation alone."""
    ids = torch.tensor(prompt + response)
    logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return logps[-len(response) :]


def test_a_tail_is_what_one_response_has_past_the_end_of_the_other(make_model, pairs, batch):
    model, tails = make_model().double().eval(), (1.0, 0.3, 0.0)
    with torch.no_grad():
        ours = pair_logps(model, batch, 7, tails).view(3, 2, 4)
        for k, pair in enumerate(pairs):
            each = [token_logps(model, pair.prompt_ids, y) for y in (pair.a_ids, pair.b_ids)]
            shorter = min(len(logps) for logps in each)
            for side, logps in enumerate(each):
                for tail, scores in zip(tails, ours, strict=True):
                    expected = logps[:shorter].sum() + tail * logps[shorter:].sum()
                    assert scores[side, k].item() == pytest.approx(expected.item(), rel=1e-6)


def reference_of(model, batch, tail: float) -> ReferenceLogps:
    with torch.no_grad():
        a, b = (logps.tolist() for logps in pair_logps(model, batch, 64, [tail]).chunk(2))
    return ReferenceLogps(dict(zip(batch.ids, zip(a, b, strict=True), strict=True)))


def check_every_mode(make_model, batch, losses, dtype) -> None:
    """Against autograd, with a spot check in each; a second pass would be an error."""
    tails = tail_weights(losses)
    model, before = make_model(1).to(dtype).train(), make_model(2).to(dtype).eval()
    references = {tail: reference_of(before, batch, tail) for tail in tails}

    def run(model):
        logps = pair_logps(model, batch, 7, references)
        found = preference_losses(
            score_pairs(logps, batch, references, losses),
            batch.labels,
            loss=losses,
            pair_weights=batch.pair_weights,
        )
        return found, logps

    found = raco_fast.verify(model, run, quiet=True)
    assert set(found.modes) == {"one_backward", "gram_first", "gram_first, keep_dy"}
    assert found.wrong == []
    weights = {"x": 0.4, "y": 0.6}
    for mode in ("one_backward", "gram_first"):  # with a spot check in each
        with raco_fast.prepare(model, strict=True, check_every=1):
            opt = raco_fast.ClippedCAGradAdamW(model.parameters(), weights=weights)
            found_losses, logps = run(model)
            opt.backward(found_losses, scores=logps, mode=mode)
            opt.zero_grad()
    assert max(found.values()) < 1e-5  # Llama's norms work in float32 whatever the weights are


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_one_backward_pass_is_exact_for_every_loss_beside_another(make_model, pairs, name, dtype):
    """The other objective has labels and weights of its own."""
    losses = {"x": make_loss(name), "y": make_loss("sigmoid" if name != "sigmoid" else "nca")}
    assert len(tail_weights(losses)) == (2 if name == "ld" else 1)
    kind = "pairs" if why_not_shared(losses) is None else "packed"
    check_every_mode(make_model, batch_of(kind, pairs), losses, dtype)


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if make_loss(name).pair_function is not None]
)
def test_losses_of_a_pair_take_one_pass_on_shared_rows(make_model, pairs, name):
    loss = make_loss(name)
    labels = [{"x": 1, "y": -1}, {"x": -1, "y": -1}, {"x": 1, "y": 0}, {"x": -1, "y": 1}]
    if loss.soft:
        labels[0]["y"], labels[1]["x"] = -0.75, 0.6
    given = [replace(pair, labels=each) for pair, each in zip(pairs, labels, strict=True)]
    losses = dict.fromkeys("xy", loss)
    assert why_not_shared(losses) is None
    check_every_mode(make_model, batch_of("pairs", given), losses, torch.float32)


def test_ld_alone_costs_no_second_run(make_model, batch):
    losses = {name: make_loss({"name": "ld", "alpha": 0.25}) for name in ("x", "y")}
    references = {0.25: reference_of(make_model(2), batch, 0.25)}
    logps = pair_logps(make_model(1), batch, 64, references)
    assert tail_weights(losses) == (0.25,)
    assert logps.shape == (8,)
    scores = score_pairs(logps, batch, references, losses)
    assert scores["x"] is scores["y"]


def test_alpha_of_one_is_dpo(make_model, batch):
    losses = {"x": make_loss({"name": "ld", "alpha": 1}), "y": make_loss("sigmoid")}
    assert tail_weights(losses) == (1.0,)
