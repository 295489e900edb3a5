"""MODPO: other objectives' rewards, from models that were trained for them."""

import math
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from raco_fast.dpo.models import trainable
from raco_fast.dpo.run.check_report import check
from raco_fast.dpo.run.conflict import measure
from raco_fast.dpo.run.margin_rewards import margin_rewards
from raco_fast.dpo.run.moving_reference import ReferenceOptions
from raco_fast.dpo.run.reward_source import RewardSource
from raco_fast.dpo.run.trained import evaluate_trained
from raco_fast.dpo.run.trainer import Interrupted, Trainer, train
from raco_fast.dpo.run.verification import verify_run

MODPO = {"losses": {"sure": {"name": "modpo", "beta": 0.3, "weight": 0.4}}}


@pytest.fixture
def adapter(tiny, tmp_path):
    """A LoRA adapter on the tiny model, which names it as its base."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=3, target_modules=["q_proj"])
    )
    torch.manual_seed(3)
    for p in trainable(model).values():
        torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def other(save_tiny):
    """A whole model."""
    return save_tiny(seed=7)


@pytest.fixture
def sources(adapter, other, tiny):
    """An adapter's reward and a model's, whose weights leave 0.4 of 1."""
    return [
        RewardSource(str(adapter), weight=0.5, beta=0.2),
        RewardSource(str(other), weight=0.1, beta=0.7, reference=str(tiny)),
    ]


@torch.no_grad()
def logp(model, prompt: list[int], response: list[int]) -> float:
    ids = torch.tensor([prompt + response])
    each = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(each.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum())


def rewards_by_hand(pairs, adapter, other, tiny) -> dict[str, tuple[float, ...]]:
    """0.5 * 0.2 * the adapter's log-ratio + 0.1 * 0.7 * the model's, in float64."""
    base, whole = (AutoModelForCausalLM.from_pretrained(f).double().eval() for f in (tiny, other))
    beneath = AutoModelForCausalLM.from_pretrained(tiny).double()
    tuned = PeftModel.from_pretrained(beneath, adapter).double().eval()
    return {
        pair.id: tuple(
            0.5 * 0.2 * (logp(tuned, pair.prompt_ids, y) - logp(base, pair.prompt_ids, y))
            + 0.1 * 0.7 * (logp(whole, pair.prompt_ids, y) - logp(base, pair.prompt_ids, y))
            for y in (pair.a_ids, pair.b_ids)
        )
        for pair in pairs
    }


def test_the_first_loss_is_that_of_the_rewards_alone(
    runs, make_config, adapter, other, tiny, sources
):
    """Where the policy is its reference, R_w - R_l = -(sum of the others' differences) / w."""
    config = make_config({"dropout": False}, margin_rewards={"sure": sources}, max_steps=1, **MODPO)
    runner = Trainer(config)
    sets = (runner.pairs, runner.inputs.held_out)
    expected = [rewards_by_hand(pairs, adapter, other, tiny) for pairs in sets]
    for of_set, known in zip(expected, runner.rewards.of_sets, strict=True):
        assert list(known) == ["sure"]
        assert known["sure"].by_id.keys() == of_set.keys()
        for id, by_hand in of_set.items():
            assert known["sure"].by_id[id] == pytest.approx(by_hand, abs=2e-5)
    runner.run()
    (first,) = runs.steps(config)
    evaluation = runs.evaluations(config)[0]
    of_step = [runner.pairs[i] for i in runner.batches.indices(0)]
    for pairs, by_hand, found in (
        (of_step, expected[0], first["loss/sure"]),
        (sets[1], expected[1], evaluation["eval_loss/sure"]),
    ):
        losses = []
        for pair in pairs:
            a, b = by_hand[pair.id]
            if pair.labels["sure"]:
                losses.append(math.log1p(math.exp(pair.labels["sure"] * (a - b) / 0.4)))
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert first["loss/kind"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins/sure"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_a_model_scores_once_and_later_runs_read_it(
    runs, make_config, monkeypatch, sources, tmp_path
):
    from raco_fast.dpo.run import margin_rewards as module

    loaded, scored = [], []
    make, read = module.make_policy, module.reference_logps
    monkeypatch.setattr(module, "make_policy", lambda *g: loaded.append(1) or make(*g))

    def reading(*given, **named):
        scored.append(1)
        return read(*given, **named)

    monkeypatch.setattr(module, "reference_logps", reading)
    both = {"sure": sources, "kind": [sources[0]]}
    losses = MODPO["losses"] | {"kind": {"name": "modpo", "weight": 0.5}}
    given = {"margin_rewards": both, "losses": losses, "max_steps": 3}
    first, again = (make_config(output_dir=str(tmp_path / n), **given) for n in ("1", "2"))
    train(first)
    assert (len(loaded), len(scored)) == (1, 8)  # two models, two references, two sets of pairs
    files = {f: f.stat().st_mtime_ns for f in first.cache_folder.glob("*.safetensors")}
    runs.interrupt_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train(again)
    runs.interrupt_after(monkeypatch, None)
    train(again, resume=True)
    assert {f: f.stat().st_mtime_ns for f in first.cache_folder.glob("*.safetensors")} == files
    runs.assert_same_run(first, again)


@pytest.mark.slow
def test_a_reward_model_of_another_content_is_another_run(
    runs, make_config, monkeypatch, adapter, sources
):
    config = make_config(margin_rewards={"sure": sources}, max_steps=3, **MODPO)
    runs.interrupt_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train(config)
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(ValueError, match="with another margin_rewards: the settings agree but its"):
        train(config, resume=True)
    heavier = [replace(sources[0], weight=0.6)]
    changed = make_config(margin_rewards={"sure": heavier}, max_steps=3, **MODPO)
    with pytest.raises(
        ValueError, match=r"margin_rewards.sure.weight: \[0.5, 0.1\] in the checkpoint, \[0.6\] now"
    ):
        train(changed, resume=True)


@pytest.mark.slow
def test_the_other_commands_know_the_rewards(make_config, sources):
    config = make_config(
        {"dropout": False}, margin_rewards={"sure": sources}, pairs_per_step=32, **MODPO
    )
    assert not verify_run(config).wrong
    measured, plain = (
        measure(c, 32) for c in (config, replace(config, losses={}, margin_rewards={}))
    )
    assert plain.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(measured.losses[0] - math.log(2)) > 1e-3
    assert measured.losses[1] == pytest.approx(plain.losses[1])
    assert not config.cache_folder.exists()


@pytest.mark.slow
def test_a_trained_model_is_evaluated_with_the_rewards_and_the_first_reference(
    make_config, sources
):
    config = make_config(
        margin_rewards={"sure": sources},
        reference=ReferenceOptions(sync_steps=1, mixup_alpha=0.5),
        max_steps=4,
        **MODPO,
    )
    at_the_end, found = train(config), evaluate_trained(config)
    for name, value in found.items():
        assert value == pytest.approx(at_the_end[name], rel=1e-4, abs=1e-6), name
    assert abs(found["eval_rewards/margins/sure"]) > 1e-3


def test_rewards_and_losses_go_together(make_config):
    source = RewardSource("x", weight=0.6)
    for given, message in (
        ({"margin_rewards": {"sure": [source]}}, r"for the losses \['modpo'\].* got 1 for 'sure'"),
        (MODPO, r"for the losses \['modpo'\], which need some, got 0 for 'sure'"),
        (MODPO | {"margin_rewards": {"nice": [source]}}, r"must name objectives .* got 'nice'"),
        (
            MODPO | {"margin_rewards": {"sure": [source, source]}},
            r"`margin_rewards.sure` must have weights that sum to 1 .*, got 1.6; its own is 0.4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(**given)
    with pytest.raises(ValueError, match=r"`weight` of 'x' must be above 0, got 0.0; leave out"):
        RewardSource("x", weight=0.0)
    with pytest.raises(ValueError, match=r"`beta` of 'x' must be above 0, got -1"):
        RewardSource("x", weight=0.1, beta=-1.0)
    with pytest.raises(ValueError, match=r"'x' must have a `base`, .* got both; leave one"):
        RewardSource("x", weight=0.1, base="a", reference="b")


def test_what_cannot_score_is_named(make_config, adapter, other, tiny, tmp_path, settings):
    words = AutoTokenizer.from_pretrained(tiny)
    words.add_tokens(["new"])
    foreign = tmp_path / "foreign"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(foreign)
    words.save_pretrained(foreign)
    runner = Trainer(make_config())
    for source, message in (
        (RewardSource(str(other), 0.6), "it is a whole model; name the one that it was trained"),
        (RewardSource(str(adapter), 0.6, reference=str(tiny)), "adapter, and `reference` is for"),
        (RewardSource(str(foreign), 0.6, reference=str(tiny)), "must have the vocabulary of the"),
        (RewardSource(str(tmp_path / "none"), 0.6), "none"),
    ):
        config = make_config(margin_rewards={"sure": [source]}, **MODPO)
        with pytest.raises(ValueError, match=rf"`margin_rewards`: '{source.name}': .*{message}"):
            margin_rewards(config, runner.inputs, runner.processes, runner.pairs)
        (failure,) = check(config).failures
        assert re.match(rf"`margin_rewards`: '{source.name}': .*{message}", failure)
