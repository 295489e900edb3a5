"""One step of preference training against a step written out in float64, pair by pair."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from raco_fast.dpo.data.batches import unlabelled
from raco_fast.dpo.data.layout import Kind, Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.margin_losses import Sigmoid
from raco_fast.dpo.run.step import PreferenceStep
from raco_fast.dpo.scoring import ReferenceLogps
from raco_fast.engine.prepare import prepare
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"x": 0.7, "y": 0.3}
BETA = 0.3
LABELS = [(1, -1), (-1, 0), (0, 0), (0, 0), (1, 1), (0, -1), (-1, 1)]
ADAM = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}


def make_pairs() -> list[EncodedPair]:
    draw = torch.Generator().manual_seed(5)

    def ids(k: int) -> list[int]:
        return torch.randint(3, 32, (1 + k,), generator=draw).tolist()

    # Longest first, so that pairs 2 and 3, which nobody has labelled, are a micro-batch of two.
    return [
        EncodedPair(f"p{k}", [1, *ids(9 - k)], [*ids(1), 2], [*ids(2), 2], {"x": x, "y": y})
        for k, (x, y) in enumerate(LABELS)
    ]


def losses_written_out(model, pairs, reference) -> dict[str, torch.Tensor]:
    """Mean DPO losses from all logits of one sequence at a time."""
    margins = []
    for pair in pairs:
        sides = []
        for response, known in zip((pair.a_ids, pair.b_ids), reference[pair.id], strict=True):
            ids = torch.tensor(pair.prompt_ids + response)
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
            scored = logps.gather(-1, ids[1:, None])[len(pair.prompt_ids) - 1 :]
            sides.append(scored.sum() - known)
        margins.append(sides[0] - sides[1])
    result = {}
    for name in WEIGHTS:
        signed = [p.labels[name] * m for p, m in zip(pairs, margins, strict=True) if p.labels[name]]
        result[name] = -F.logsigmoid(BETA * torch.stack(signed)).mean()
    return result


def layout_of_two(kind: Kind, pairs: list[EncodedPair]) -> Layout:
    """Room for the longest two pairs, so that the second micro-batch has no label."""
    layout = Layout(kind, 2, math.inf, 0)
    return layout.with_tokens(sum(map(layout.length, pairs[:2])))


@pytest.mark.parametrize("kind", ["pairs", "packed", "padded"])
@pytest.mark.parametrize("mode", ["one_backward", "autograd", "gram_first"])
def test_steps_are_adamw_on_the_weighted_losses_however_they_are_cut(make_model, mode, kind):
    model, pairs = make_model(), make_pairs()
    reference = {pair.id: (-float(k) - 3, -4.5) for k, pair in enumerate(pairs)}
    truth = copy.deepcopy(model).double()
    layout = layout_of_two(kind, pairs)
    assert [p.id for p in layout.rounds(pairs)[1][0]] == ["p2", "p3"]
    if mode == "gram_first":
        layout = Layout(kind, len(pairs), math.inf, 0)
    if mode != "autograd":
        prepare(model, strict=True)
    optimizer = ClippedCAGradAdamW(
        model.parameters(), weights=WEIGHTS, rule="linear", max_grad_norm=None, **ADAM
    )
    losses = dict.fromkeys(WEIGHTS, Sigmoid(beta=BETA))
    references = {1.0: ReferenceLogps(reference)}
    learn = PreferenceStep(model, optimizer, references, losses, layout, mode=mode)
    adamw = torch.optim.AdamW(truth.parameters(), **ADAM)
    for _ in range(3):
        result = learn(pairs)
        expected = losses_written_out(truth, pairs, reference)
        adamw.zero_grad()
        sum(WEIGHTS[name] * loss for name, loss in expected.items()).backward()
        adamw.step()
        for name, loss in expected.items():
            assert float(result.losses[name]) == pytest.approx(loss.item(), rel=1e-5)
    metrics = result.metrics()
    assert metrics["loss/x"] == float(result.losses["x"])
    assert (metrics["pairs/x"], metrics["pairs/y"], metrics["raco/skipped_steps"]) == (4, 4, 0)
    assert result.tokens == sum(2 * len(p.prompt_ids) + len(p.a_ids) + len(p.b_ids) for p in pairs)
    for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["one_backward", "autograd", "gram_first"])
def test_a_step_without_labels_touches_nothing(make_model, mode):
    """Steps along zeros would decay the weights and count in AdamW's averages."""
    model, pairs = make_model(), make_pairs()
    bare = [unlabelled(pair) for pair in pairs]
    references = {1.0: ReferenceLogps({pair.id: (-3.0, -4.5) for pair in pairs})}
    if mode != "autograd":
        prepare(model, strict=True)
    optimizer = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, **ADAM)
    losses = dict.fromkeys(WEIGHTS, Sigmoid(beta=BETA))
    layout = Layout("pairs", len(pairs), math.inf, 0)
    learn = PreferenceStep(model, optimizer, references, losses, layout, mode=mode)

    def everything():
        state = optimizer.state_dict()["state"]
        return copy.deepcopy(
            [[p.detach() for p in model.parameters()], state, torch.get_rng_state()]
        )

    for of_step in (bare, pairs, bare):
        before = everything()
        result = learn(of_step)
        if of_step is pairs:
            assert not torch.equal(everything()[0][0], before[0][0])
            continue
        torch.testing.assert_close(everything(), before, rtol=0, atol=0)
        assert (result.solution, result.losses, result.tokens) == (None, {}, 0)
        assert result.metrics() == {"raco/skipped_steps": 0.0}
        assert not result.skipped
        assert all(p.grad is None for p in model.parameters())


def test_an_objective_without_a_label_in_the_step_has_no_loss_there(make_model):
    """Its gradient is zero, which the others' losses say nothing of."""
    model, pairs = make_model(), make_pairs()
    only_x = [replace(pair, labels=pair.labels | {"y": 0}) for pair in pairs]
    references = {1.0: ReferenceLogps({pair.id: (-3.0, -4.5) for pair in pairs})}
    optimizer = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, **ADAM)
    losses = dict.fromkeys(WEIGHTS, Sigmoid(beta=BETA))
    layout = layout_of_two("pairs", pairs)
    learn = PreferenceStep(model, optimizer, references, losses, layout, mode="autograd")
    metrics = learn(only_x).metrics()
    assert {"loss/x", "rewards/margins/x", "pairs/x"} <= set(metrics)
    assert not {"loss/y", "rewards/margins/y", "pairs/y"} & set(metrics)
    assert metrics["raco/grad_norm/y"] == 0.0 < metrics["raco/grad_norm/x"]
    assert metrics["raco/coefficient/x"] == pytest.approx(WEIGHTS["x"])
