import math
from contextlib import nullcontext
from dataclasses import replace
from threading import Event, Thread

import pytest
import torch
from torch import nn

from raco_fast.dpo.data.collation import collate
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.margin_losses import Sigmoid
from raco_fast.dpo.models import LoraOptions
from raco_fast.dpo.policy import add_adapter
from raco_fast.dpo.run import reference_cache, reference_parts, reference_turns
from raco_fast.dpo.run.reference_cache import data_hash, reference_logps
from raco_fast.dpo.scoring import ReferenceLogps, adapter_off, pair_logps, score_pairs


def make_pairs(n: int = 9) -> list[EncodedPair]:
    g = torch.Generator().manual_seed(8)

    def ids() -> list[int]:
        length = int(torch.randint(1, 8, (), generator=g))
        return torch.randint(3, 32, (length,), generator=g).tolist()

    return [EncodedPair(f"p{k}", [1, *ids()], [*ids(), 2], [*ids(), 2], {"x": 1}) for k in range(n)]


def padded(size: int) -> Layout:
    return Layout("padded", size, math.inf, 0)


def references(model, pairs, folder, layout=None, **changes) -> dict[float, ReferenceLogps]:
    layout = layout or padded(4)
    arguments = {"model_hash": "m", "chunk_tokens": 5} | changes
    rounds = layout.rounds(pairs)
    return reference_logps(model, pairs, rounds, layout, cache_dir=folder, **arguments)


def reference(model, pairs, folder, layout=None, **changes) -> ReferenceLogps:
    return references(model, pairs, folder, layout, **changes)[1.0]


@pytest.fixture
def computed(monkeypatch):
    """Counts the passes over the data that really ran a model."""
    calls = []
    original = reference_cache._scored
    monkeypatch.setattr(
        reference_cache, "_scored", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    return calls


@pytest.mark.parametrize("kind", ["pairs", "packed", "padded"])
def test_reference_logps_are_the_models_own_by_pair(make_model, tmp_path, computed, kind):
    model, pairs = make_model().train(), make_pairs()
    ours = reference(model, pairs, tmp_path, Layout(kind, 4, 40, 0))
    assert model.training
    model.eval()
    for pair in pairs:
        for side, response in enumerate((pair.a_ids, pair.b_ids)):
            ids = torch.tensor([pair.prompt_ids + response])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            each = logps.gather(-1, ids[0, 1:, None])[len(pair.prompt_ids) - 1 :]
            assert ours.by_id[pair.id][side] == pytest.approx(float(each.sum()), rel=1e-5)
    a, b = ours.of(["p3", "p0"], torch.device("cpu"))
    assert a.tolist() == pytest.approx([ours.by_id["p3"][0], ours.by_id["p0"][0]])
    assert b.tolist() == pytest.approx([ours.by_id["p3"][1], ours.by_id["p0"][1]])
    assert len(computed) == 1


def test_the_cache_is_used_again_for_the_same_model_and_tokens_only(make_model, tmp_path, computed):
    model, pairs = make_model(), make_pairs()
    first = reference(model, pairs, tmp_path)
    other_labels = [EncodedPair(p.id, p.prompt_ids, p.a_ids, p.b_ids, {"z": -1}) for p in pairs]
    assert reference(model, other_labels, tmp_path, chunk_tokens=50).by_id == first.by_id
    assert len(computed) == 1
    reference(model, pairs, tmp_path, model_hash="another")
    assert len(computed) == 2
    swapped = [EncodedPair(p.id, p.prompt_ids, p.b_ids, p.a_ids, p.labels) for p in pairs]
    assert reference(model, swapped, tmp_path).by_id != first.by_id
    assert len(computed) == 3
    reference(model, pairs[:-1], tmp_path)
    assert len(computed) == 4
    tails = [references(model, pairs, tmp_path, tails=[t])[t].by_id for t in (0.25, 0.0, 0.25)]
    assert len(computed) == 6
    assert tails[0] == tails[2] != tails[1] != first.by_id
    assert len(list(tmp_path.iterdir())) == 6


def test_all_tail_weights_are_scored_in_one_pass(make_model, tmp_path, computed):
    model, pairs = make_model(), make_pairs()
    both = references(model, pairs, tmp_path, tails=[1.0, 0.25])
    assert (list(both), len(computed)) == ([1.0, 0.25], 1)
    for tail, ours in both.items():
        alone = references(model, pairs, tmp_path / str(tail), tails=[tail])[tail]
        for id, values in alone.by_id.items():
            assert ours.by_id[id] == pytest.approx(values, rel=1e-5)
    again = references(model, pairs, tmp_path, tails=[1.0, 0.25])
    assert len(computed) == 3
    assert {t: r.by_id for t, r in again.items()} == {t: r.by_id for t, r in both.items()}


def test_other_micro_batches_are_scored_anew_unless_any_will_do(
    make_model, tmp_path, computed, caplog
):
    """Their roundings are others: a policy that is scored in these would not cancel those."""
    caplog.set_level("INFO")
    model, pairs = make_model(), make_pairs()
    first = reference(model, pairs, tmp_path)
    assert reference(model, pairs, tmp_path, padded(3), any_rounds=True).by_id == first.by_id
    assert len(computed) == 1
    assert "were scored in other micro-batches than those now" in caplog.text
    for id, values in reference(model, pairs, tmp_path, padded(3)).by_id.items():
        assert values == pytest.approx(first.by_id[id], rel=1e-5)
    assert reference(model, pairs, tmp_path, Layout("pairs", 4, 40, 0)).by_id != first.by_id
    assert len(computed) == 3
    caplog.clear()
    assert reference(model, pairs, tmp_path, any_rounds=True).by_id == first.by_id
    assert "were scored in other micro-batches" not in caplog.text  # there are its own


def test_data_hash_knows_labels_unless_told_otherwise():
    pairs = make_pairs(3)
    relabelled = [EncodedPair(p.id, p.prompt_ids, p.a_ids, p.b_ids, {"x": -1}) for p in pairs]
    assert data_hash(pairs) == data_hash(make_pairs(3)) != data_hash(relabelled)
    weighted, soft = (
        [replace(pairs[0], **{field: {"x": 0.75}}), *pairs[1:]]
        for field in ("pair_weights", "labels")
    )
    assert len({data_hash(pairs), data_hash(weighted), data_hash(soft)}) == 3
    assert data_hash(pairs, with_labels=False) == data_hash(soft, with_labels=False)
    assert data_hash(pairs, with_labels=False) == data_hash(relabelled, with_labels=False)
    assert data_hash(pairs, with_labels=False) != data_hash(pairs[::-1], with_labels=False)


def test_the_adapter_is_off_in_the_reference_and_on_in_the_policy(make_model, tmp_path):
    pairs = make_pairs(4)
    base = reference(make_model(), pairs, tmp_path / "a").by_id
    policy = add_adapter(make_model(), LoraOptions(r=2))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ours = reference(policy, pairs, tmp_path / "b")
    assert ours.by_id == base
    batch, losses = collate(pairs, 0), {"x": Sigmoid()}
    scores = score_pairs(pair_logps(policy, batch, 5), batch, {1.0: ours}, losses)["x"]
    assert (scores.logps_a - scores.ref_logps_a).abs().min() > 1e-3
    assert scores.logps_a.requires_grad
    assert not scores.ref_logps_a.requires_grad
    with adapter_off(policy), torch.no_grad():
        again = pair_logps(policy, collate(pairs, 0), 5)
    torch.testing.assert_close(again.chunk(2)[0], scores.ref_logps_a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_untrained_policy_scores_exactly_as_its_reference(make_model, tmp_path, dtype, kind):
    model, pairs = make_model().to(dtype).eval(), make_pairs()
    layout = Layout(kind, 4, 40, 0)
    ours = reference(model, pairs, tmp_path, layout)
    for (group,) in layout.rounds(pairs):
        batch = layout.batch(group)
        logps = pair_logps(model, batch, 5)
        scores = score_pairs(logps, batch, {1.0: ours}, {"x": Sigmoid()})["x"]
        assert torch.equal(scores.logps_a, scores.ref_logps_a)
        assert torch.equal(scores.logps_b, scores.ref_logps_b)


def test_a_reference_that_is_not_finite_is_an_error_and_not_cached(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(
        ValueError, match="`model` gives log-probabilities that are not finite for 9"
    ):
        reference(model, make_pairs(), tmp_path)
    assert not list(tmp_path.iterdir())


class Stopped(Exception):  # noqa: N818
    """In place of Ctrl-C."""


def stop_after(monkeypatch, batches: int) -> list[int]:
    """Let the model score so many batches in all, then stop; returns the sizes of those scored."""
    scored: list[int] = []

    def logps(model, batch, *args):
        if len(scored) == batches:
            raise Stopped
        scored.append(len(batch.ids))
        return pair_logps(model, batch, *args)

    monkeypatch.setattr(reference_cache, "pair_logps", logps)
    return scored


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_pass_goes_on_where_it_was(
    make_model, tmp_path, monkeypatch, damaged, caplog
):
    model, pairs = make_model(), make_pairs(11)
    whole = reference(model, pairs, tmp_path / "whole").by_id
    scored = stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        reference(model, pairs, tmp_path / "cut")
    assert scored == [4, 4]
    (part,) = (tmp_path / "cut").glob("*.parts/part-*.safetensors")
    if damaged:
        part.write_bytes(part.read_bytes()[:-3])
    scored = stop_after(monkeypatch, 99)
    assert reference(model, pairs, tmp_path / "cut").by_id == whole  # to the last bit
    assert scored == ([4, 4, 3] if damaged else [3])
    assert ("a part of the reference pass is scored again" in caplog.text) == damaged
    (left,) = (tmp_path / "cut").iterdir()
    assert left.suffix == ".safetensors"


def test_parts_are_written_now_and_then_not_only_at_the_end(make_model, tmp_path, monkeypatch):
    """What kills a process leaves it no time."""
    monkeypatch.setattr(reference_parts, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(reference_cache, "_kept", lambda parts: nullcontext())
    stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        reference(make_model(), make_pairs(11), tmp_path)
    scored = stop_after(monkeypatch, 99)
    reference(make_model(), make_pairs(11), tmp_path)
    assert scored == [3]


def test_parts_of_other_micro_batches_are_not_taken_over(make_model, tmp_path, monkeypatch):
    """Their roundings are others."""
    stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        reference(make_model(), make_pairs(11), tmp_path)
    scored = stop_after(monkeypatch, 99)
    ours = reference(make_model(), make_pairs(11), tmp_path, padded(3)).by_id
    assert scored == [3, 3, 3, 2]
    whole = reference(make_model(), make_pairs(11), tmp_path / "whole", padded(3)).by_id
    assert ours == whole


def test_a_cache_that_cannot_be_written_loses_nothing(make_model, tmp_path, monkeypatch, caplog):
    """A file stands where the folder would be."""
    place = tmp_path / "cache"
    place.write_text("not a folder")
    monkeypatch.setattr(reference_parts, "EVERY_SECONDS", 0.0)
    model, pairs = make_model(), make_pairs()
    assert reference(model, pairs, place).by_id == reference(model, pairs, tmp_path / "b").by_id
    assert caplog.text.count("reference log-probabilities are not cached, the next run") == 1
    assert caplog.text.count("an interruption of the reference pass will lose") == 1


@pytest.mark.parametrize("damage", [lambda raw: raw[:50], lambda raw: raw[:-1] + b"\x01"])
def test_a_damaged_cache_is_computed_again(make_model, tmp_path, computed, caplog, damage):
    model, pairs = make_model(), make_pairs()
    first = reference(model, pairs, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert reference(model, pairs, tmp_path).by_id == first.by_id
    assert "the reference cache cannot be used and is computed again" in caplog.text
    assert reference(model, pairs, tmp_path).by_id == first.by_id
    assert len(computed) == 2


def test_of_runs_that_start_together_one_scores_and_the_others_wait(
    make_model, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    model, pairs = make_model(), make_pairs(11)
    scored: list[int] = []
    waiting, others = Event(), []

    def logps(model, batch, *args):
        if not others:  # in the middle of the first pass the others begin
            others.extend(Thread(target=lambda: found.append(again())) for _ in range(2))
            for thread in others:
                thread.start()
            assert waiting.wait(30)
        scored.append(len(batch.ids))
        return pair_logps(model, batch, *args)

    def again():
        return reference(model, pairs, tmp_path).by_id

    def wait(descriptor, parts, original=reference_turns._wait):
        if others:
            waiting.set()
        original(descriptor, parts)

    found: list[dict[str, tuple[float, float]]] = []
    monkeypatch.setattr(reference_cache, "pair_logps", logps)
    monkeypatch.setattr(reference_turns, "_wait", wait)
    first = again()
    for thread in others:
        thread.join(30)
    assert scored == [4, 4, 3]
    assert found == [first, first]
    assert "another run computes reference-" in caplog.text
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
