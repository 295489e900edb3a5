"""Whole runs of a tiny model, and what must hold between them."""

import json
import math
from pathlib import Path

import pytest
import torch

from raco_fast.dpo.data.batches import labelled_counts
from raco_fast.dpo.data.collation import collate
from raco_fast.dpo.run import reference_cache
from raco_fast.dpo.run import step as step_module
from raco_fast.dpo.run.identity import check_same_run, identity
from raco_fast.dpo.run.trainer import Trainer, train
from raco_fast.dpo.scoring import pair_logps
from raco_fast.solver.rules.nash import Nash

LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "lora", [None, pytest.param(LORA["lora"], marks=SLOW)], ids=["full", "lora"]
)
def test_learnable_preferences_are_learnt(runs, make_config, write_pairs, save_tiny, lora):
    file = write_pairs("more.jsonl", 160, 1, {"sure": "yes", "kind": "calm"})
    held_out = write_pairs("held_out.jsonl", 60, 2, {"sure": "yes", "kind": "calm"})
    config = make_config(
        {"name": str(save_tiny()), "lora": lora},
        data=[{"path": str(file)}],
        eval_data=[{"path": str(held_out)}],
        lr=0.01 if lora else 0.003,
    )
    last = train(config)
    first = runs.evaluations(config)[0]
    assert (first["step"], last["step"]) == (0, 40)
    for name in ("sure", "kind"):
        assert first[f"eval_rewards/accuracies/{name}"] == 0.5
        assert first[f"eval_loss/{name}"] == pytest.approx(math.log(2), rel=1e-6)
        assert last[f"eval_rewards/accuracies/{name}"] > 0.55
        assert last[f"eval_rewards/margins/{name}"] > 0.05
    assert 0.7 * last["eval_loss/sure"] + 0.3 * last["eval_loss/kind"] < 0.62
    assert last["eval_rewards/accuracies"] > 0.7
    assert runs.steps(config)[-1]["loss/sure"] < runs.steps(config)[0]["loss/sure"]


def test_metrics_have_the_names_of_the_design(runs, make_config):
    config = make_config(max_steps=1, eval_every=1)
    train(config)
    preference = [
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
        *(f"logps/{name}" for name in ("chosen", "rejected", "accuracies")),
    ]
    objectives = ("sure", "kind")
    each = [
        f"{name}/{objective}" for name in (*preference, "pairs", "loss") for objective in objectives
    ]
    (step,) = runs.steps(config)
    assert set(step) == {
        *("step", "epoch", "learning_rate"),
        *preference,
        *each,
        *(f"raco/{name}" for name in ("gap", "clip_active", "g0_norm", "update_norm", "c")),
        *(f"raco/{n}/{o}" for n in ("weight", "p", "coefficient", "grad_norm") for o in objectives),
        *("raco/cosine/sure:kind", "raco/skipped_steps"),
    }
    for evaluation in runs.evaluations(config):
        assert set(evaluation) == {"step", *(f"eval_{name}" for name in (*preference, *each))}
    assert [e["step"] for e in runs.evaluations(config)] == [0, 1]


def test_another_seed_is_another_run(runs, make_config, tmp_path):
    configs = [make_config(seed=s, output_dir=str(tmp_path / str(s)), max_steps=2) for s in (4, 5)]
    for config in configs:
        train(config)
    assert not torch.equal(*(runs.weights(c)["model.norm.weight"] for c in configs))


def assert_close_runs(runs, a, b, rtol: float) -> None:
    for one, two in zip(runs.steps(a), runs.steps(b), strict=True):
        for name in ("loss/sure", "loss/kind", "raco/grad_norm/sure", "raco/cosine/sure:kind"):
            assert one[name] == pytest.approx(two[name], rel=rtol)
    before, after = runs.weights(a), runs.weights(b)
    assert all(torch.allclose(before[n], after[n], rtol=rtol, atol=rtol) for n in before)


def test_micro_batches_do_not_change_a_step(runs, make_config, save_tiny, tmp_path):
    model = {"name": str(save_tiny())}  # no dropout: its draws depend on the batches
    both = [
        make_config(
            model,
            pairs_per_micro_batch=size,
            output_dir=str(tmp_path / str(size)),
            eps=1e-3,
            max_steps=5,
        )
        for size in (8, 1)
    ]
    for config in both:
        train(config)
    assert_close_runs(runs, *both, rtol=2e-5)
    assert runs.steps(both[0])[-1]["raco/grad_norm/kind"] > 1e-3


@pytest.mark.parametrize("lora", [None, LORA["lora"]], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_steps(runs, make_config, tmp_path, lora):
    both = [
        make_config(
            # sdpa would attend document by document without it, in other roundings.
            {"lora": lora, "gradient_checkpointing": on, "attention": "eager"},
            max_steps=4,
            output_dir=str(tmp_path / str(on)),
        )
        for on in (False, True)
    ]
    for config in both:
        train(config)
    runs.assert_equal(runs.weights(both[0]), runs.weights(both[1]))


@pytest.mark.parametrize(
    "lora", [None, pytest.param(LORA["lora"], marks=SLOW)], ids=["full", "lora"]
)
def test_bf16_trains(runs, make_config, lora):
    config = make_config({"dtype": "bf16", "lora": lora, "dropout": False}, epochs=4)
    last = train(config)
    assert last["eval_loss/sure"] < 0.65
    kinds = {t.dtype for t in runs.weights(config).values()}
    assert kinds == ({torch.float32} if lora else {torch.bfloat16})


def test_objectives_may_have_pairs_of_their_own(runs, make_config, write_pairs):
    """Steps of two pairs: often one objective has no pair at all, sometimes neither."""
    files = [
        {"path": str(write_pairs("sure.jsonl", 14, 5, {"sure": "yes"})), "objective": "sure"},
        {"path": str(write_pairs("kind.jsonl", 14, 6, {"kind": "calm"})), "objective": "kind"},
    ]
    config = make_config(data=files, pairs_per_step=2, pairs_per_micro_batch=1, epochs=1)
    runner = Trainer(config)
    assert all(0 in pair.labels.values() for pair in runner.pairs)
    runner.run()
    seen = [(r.get("pairs/sure", 0), r.get("pairs/kind", 0)) for r in runs.steps(config)]
    assert {(0, 0), (0, 1), (1, 0)} <= set(seen)
    counts = labelled_counts(runner.pairs, config.objectives)
    assert [sum(column) for column in zip(*seen, strict=True)] == list(counts.values())
    for record, (sure, kind) in zip(runs.steps(config), seen, strict=True):
        for name, pairs in (("sure", sure), ("kind", kind)):
            assert (record.get(f"raco/grad_norm/{name}", 0.0) > 0) == (pairs > 0)
            assert (f"loss/{name}" in record) == (pairs > 0)
            assert ("raco/gap" in record) == (sure + kind > 0)
    assert runs.steps(config)[-1]["raco/skipped_steps"] == 0


@pytest.mark.parametrize(
    ("loss", "options", "untrained"),
    [
        pytest.param("sigmoid", {"beta": 0.2, "label_smoothing": 0.1}, math.log(2), marks=SLOW),
        pytest.param("hinge", {"beta": 0.2}, 1.0, marks=SLOW),
        pytest.param("ipo", {"beta": 0.2}, 6.25, marks=SLOW),
        ("simpo", {"beta": 2.0, "simpo_gamma": 0.3}, None),
        ("ld", {"beta": 0.2, "alpha": 0.4}, math.log(2)),
    ],
)
def test_every_loss_trains(runs, make_config, loss, options, untrained):
    config = make_config(loss=loss, loss_options=options, lr=0.003, epochs=3)
    last, first = train(config), runs.evaluations(config)[0]
    if untrained is not None:
        assert first["eval_loss/sure"] == pytest.approx(untrained, rel=1e-6)
    assert last["eval_loss/sure"] < first["eval_loss/sure"]
    assert last["eval_rewards/accuracies/sure"] > 0.6


def test_every_objective_may_have_its_own_loss(runs, make_config):
    own = {"kind": {"name": "nca", "beta": 0.3}}
    config = make_config(loss="ipo", loss_options={"beta": 0.2}, losses=own, lr=0.003)
    last, first = train(config), runs.evaluations(config)[0]
    assert first["eval_loss/sure"] == pytest.approx(6.25, rel=1e-6)
    assert first["eval_loss/kind"] == pytest.approx(2 * math.log(2), rel=1e-6)
    assert last["eval_loss/sure"] < first["eval_loss/sure"]
    assert identity(config)["losses"]["kind"] == {"name": "nca", "beta": 0.3}


def soft_rows(file: Path, probability: float, weight: float) -> None:
    """Turn every label of `sure` into a probability and a weight."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        label = row["preferences"].pop("sure")
        q = 0.5 + label * (probability - 0.5)
        row |= {
            "preference_probabilities": {"sure": q},
            "pair_weights": {"sure": weight, "kind": 1},
        }
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_soft_labels_and_weights_reach_the_losses(runs, make_config, write_pairs, tmp_path):
    """Certain labels with a weight of 2 are hard labels with a loss of twice the size."""
    words = {"sure": "yes", "kind": "calm"}
    files = [write_pairs(f"{k}.jsonl", 16, 1, words) for k in range(3)]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["preferences"]["sure"])
    for file in files:
        file.write_text(kept)
    soft_rows(files[1], 1.0, 2.0)
    soft_rows(files[2], 0.9, 1.0)
    first, last = [], []
    for k, file in enumerate(files):
        config = make_config(
            data=[{"path": str(file)}],
            eval_data=[{"path": str(file)}],
            output_dir=str(tmp_path / str(k)),
            max_steps=1,
        )
        last.append(train(config))
        first.append(runs.steps(config)[0])
    for name, rel in (("loss/sure", 1e-6), ("raco/grad_norm/sure", 1e-4)):
        assert first[1][name] == pytest.approx(2 * first[0][name], rel=rel)
    assert first[1]["loss/kind"] == pytest.approx(first[0]["loss/kind"], rel=1e-6)
    assert first[2]["raco/grad_norm/sure"] < 0.9 * first[0]["raco/grad_norm/sure"]
    assert last[1]["eval_loss/sure"] > 1.5 * last[0]["eval_loss/sure"]
    assert last[2]["eval_pairs/sure"] == last[0]["eval_pairs/sure"]


def test_soft_labels_are_refused_before_a_model_is_loaded(make_config, write_pairs):
    file = write_pairs("soft.jsonl", 8, 1, {"sure": "yes", "kind": "calm"})
    soft_rows(file, 0.9, 1.0)
    config = make_config(data=[{"path": str(file)}], losses={"sure": "hinge"})
    with pytest.raises(ValueError, match=r"labels of 'sure' must be hard .* its loss 'hinge'"):
        Trainer(config)


@pytest.mark.parametrize("mode", ["one_backward", pytest.param("gram_first", marks=SLOW)])
def test_losses_of_different_scores_give_autograds_steps(
    runs, make_config, save_tiny, tmp_path, mode
):
    model, losses = {"name": str(save_tiny())}, {"kind": {"name": "ld", "alpha": 0.3}}
    both = [
        make_config(
            model,
            losses=losses,
            gradient_mode=each,
            pairs_per_micro_batch=8,
            check_every=1,
            eps=1e-3,
            max_steps=4,
            output_dir=str(tmp_path / each),
        )
        for each in (mode, "autograd")
    ]
    for config in both:
        train(config)
    assert_close_runs(runs, *both, rtol=2e-5)


def test_a_run_is_the_same_however_its_losses_are_written(make_config, tmp_path):
    simpo = {"name": "simpo", "beta": 2.0, "gamma": 0.3}
    one = make_config(loss="simpo", loss_options={"beta": 2.0, "simpo_gamma": 0.3})
    check_same_run(make_config(loss=simpo), identity(one), tmp_path)
    check_same_run(make_config(losses={"sure": simpo, "kind": simpo}), identity(one), tmp_path)
    other = make_config(loss=simpo, losses={"kind": "simpo"})
    with pytest.raises(ValueError, match=r"\(losses: .*'gamma': 0.3.* in the checkpoint, .* now\)"):
        check_same_run(other, identity(one), tmp_path)


@pytest.mark.parametrize("rule", ["linear", "cagrad", "mgda"])
def test_every_rule_trains(runs, make_config, rule):
    config = make_config(rule=rule, max_steps=2)
    train(config)
    coefficients = [runs.steps(config)[-1][f"raco/coefficient/{name}"] for name in ("sure", "kind")]
    if rule == "linear":
        assert coefficients == pytest.approx([0.7, 0.3])
    else:
        assert coefficients != pytest.approx([0.7, 0.3])


@pytest.mark.parametrize("rule", [{"name": "fairgrad", "alpha": 0.5}, Nash(), "mgda-decoupled"])
def test_rules_without_a_certificate_train(runs, make_config, rule):
    """mgda-decoupled sees the losses of the micro-batches; what a rule does not have is null."""
    config = make_config(rule=rule, max_steps=2, pairs_per_micro_batch=2)
    train(config)
    step = runs.steps(config)[-1]
    assert config.rule == ("nash" if rule == Nash() else rule)
    assert all(step[f"raco/coefficient/{name}"] > 0.0 for name in ("sure", "kind"))
    assert step["raco/gap"] is step["raco/clip_active"] is step["raco/p/sure"] is None


def test_one_objective_trains_as_plain_dpo(runs, make_config):
    config = make_config(weights={"sure": 1.0}, c=0.0, max_steps=2)
    train(config)
    assert runs.steps(config)[-1]["raco/coefficient/sure"] == 1.0


def test_reference_logps_are_computed_once_for_a_model_a_data_set_and_a_template(
    make_config, monkeypatch, tmp_path, save_tiny, write_pairs
):
    computed = []
    original = reference_cache._scored
    monkeypatch.setattr(
        reference_cache, "_scored", lambda *a, **k: computed.append(1) or original(*a, **k)
    )

    def passes(name: str, *args, **changes) -> int:
        computed.clear()
        # By default the room of a micro-batch follows from the longest pair of the training data.
        room = {"tokens_per_micro_batch": 60} | changes
        Trainer(make_config(*args, output_dir=str(tmp_path / name), **room))
        return len(computed)

    assert passes("first") == 2
    assert passes("again", rule="linear", lr=0.5) == 0
    assert passes("lora", LORA) == 0  # the adapter is off in the reference
    assert passes("other model", {"name": str(save_tiny(seed=1, attention_dropout=0.1))}) == 2
    other = write_pairs("other.jsonl", 9, 7, {"sure": "yes", "kind": "calm"})
    assert passes("other data", data=[{"path": str(other)}]) == 1
    chat = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert passes("other template", tokens={"chat_template": chat}) == 2
    assert passes("shorter", tokens={"max_length": 10}) == 2
    assert passes("first again") == 0


def test_the_evaluation_at_step_0_is_that_of_the_untrained_policy(make_config):
    for model, losses in ((None, {}), (LORA, {}), (None, {"kind": {"name": "ld", "alpha": 0.3}})):
        runner = Trainer(make_config(model, losses=losses))
        assert runner.held_out.evaluate(runner.model) == runner.held_out.evaluate_reference()


@pytest.mark.parametrize("mode", ["auto", "autograd"])
def test_a_micro_batch_of_ties_adds_nothing(runs, make_config, write_pairs, tmp_path, mode):
    file = write_pairs("pairs.jsonl", 8, 1, {"sure": "yes", "kind": "calm"})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[::2]:
        row["preferences"] = dict.fromkeys(row["preferences"], 0)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        data=[{"path": str(file)}],
        pairs_per_step=4,
        pairs_per_micro_batch=1,
        max_steps=2,
        gradient_mode=mode,
    )
    train(config)
    assert runs.steps(config)[-1]["step"] == 2
    assert runs.steps(config)[-1]["raco/skipped_steps"] == 0.0


def test_a_nan_in_a_loss_skips_the_step_and_the_run_goes_on(runs, make_config, monkeypatch, caplog):
    """The loss is NaN but its gradient is finite: the worst case, as nothing else would show it."""
    config = make_config(warmup_ratio=0.0)
    runner, seen = Trainer(config), []
    original = step_module.preference_losses

    def losses(*args, **kwargs):
        result = original(*args, **kwargs)
        if runner.state.step in (2, 3):
            result["kind"] = result["kind"] + math.nan
        return result

    def snapshot():
        state = runner.state.optimizer.state_dict()["state"]
        copied = {k: {n: t.clone() for n, t in v.items()} for k, v in state.items()}
        return [p.detach().clone() for p in runner.model.parameters()], copied

    step = runner._step

    def watched(*arguments):
        before = snapshot()
        step(*arguments)
        seen.append((before, snapshot()))

    monkeypatch.setattr(step_module, "preference_losses", losses)
    monkeypatch.setattr(runner, "_step", watched)
    last = runner.run()
    for number, (before, after) in enumerate(seen):
        if number in (2, 3):
            runs.assert_equal(before, after)
        else:
            assert not torch.equal(before[0][0], after[0][0])
    skipped = [record["raco/skipped_steps"] for record in runs.steps(config)]
    assert skipped == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert [r["loss/kind"] is None for r in runs.steps(config)].count(True) == 2
    for step, count in ((3, 1), (4, 2)):
        said = f"step {step}: a loss or gradient of 'kind' is not finite; the step was skipped ("
        assert f"{said}{count} so far)" in caplog.text
    assert last["eval_loss/sure"] < math.log(2)
    assert "10 steps, 2 of them skipped" in (config.folder / "model" / "README.md").read_text()


@pytest.mark.parametrize("lora", [None, LORA["lora"]], ids=["full", "lora"])
def test_the_saved_model_is_the_trained_one(make_config, tiny, lora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config({"lora": lora})
    runner = Trainer(config)
    runner.run()
    saved = config.folder / "model"
    if lora:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), saved)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(saved)
    runner.model.eval()
    batch = collate(runner.pairs[:8], 0)
    with torch.no_grad():
        ours, theirs = (pair_logps(model.eval(), batch, 64) for model in (runner.model, loaded))
        original = torch.cat(runner.references[1.0].of(batch.ids, torch.device("cpu")))
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-5)
    assert (ours - original).abs().max() > 0.1
    assert len(AutoTokenizer.from_pretrained(saved)) == len(runner.inputs.tokenizer)
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: " + ("peft" if lora else "transformers"))
    assert "40 training pairs" in card
    assert f"| sure | 0.7 | {labelled_counts(runner.pairs, ['sure'])['sure']} |" in card


def test_tensorboard_is_an_option(make_config):
    pytest.importorskip("tensorboard")
    config = make_config(tensorboard=True, max_steps=1)
    train(config)
    assert list((config.folder / "tensorboard").glob("events.out.tfevents.*"))
    plain = make_config(max_steps=1, output_dir=config.output_dir + "-plain")
    train(plain)
    assert not (plain.folder / "tensorboard").exists()


def test_schedule_and_warm_up(runs, make_config):
    config = make_config(warmup_ratio=0.2, schedule="linear")  # 2 of 10 steps
    train(config)
    rates = [record["learning_rate"] / config.lr for record in runs.steps(config)]
    assert rates == pytest.approx([0.0, 0.5, *(k / 8 for k in range(8, 0, -1))])


def test_pairs_that_the_model_cannot_read_are_named(make_config, save_tiny):
    with pytest.raises(
        ValueError, match=r"`tokens.max_length` must be at most the model's 9 positions"
    ):
        Trainer(make_config({"name": str(save_tiny(max_position_embeddings=9))}))
    with pytest.raises(
        ValueError, match=r"`model.tokenizer` must give token ids below the model's 12"
    ):
        Trainer(make_config({"name": str(save_tiny(vocab_size=12))}))


def test_an_objective_without_a_labelled_pair_is_an_error(make_config, write_pairs):
    file = write_pairs("only.jsonl", 8, 3, {"sure": "yes", "kind": "never"})
    with pytest.raises(
        ValueError, match="`weights` names 'kind', but no training pair is labelled"
    ):
        Trainer(make_config(data=[{"path": str(file)}]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"sure": 0.7, "kind": 0.2}}, "`weights` must sum to 1"),
        ({"weights": {"sure": 1.5, "kind": -0.5}}, "`weights`"),
        ({"c": -0.1}, "`c` must"),
        ({"c": 1.0}, "`c` must"),
        ({"rule": "nosh"}, "`rule` must"),
        ({"loss": "dpo"}, "`loss` must be one of"),
        (
            {"loss": "ipo", "loss_options": {"label_smoothing": 0.1}},
            "is no option of the loss",
        ),
        (
            {"losses": {"nice": "ipo"}},
            r"`losses` must name objectives .*, got \['nice'\]",
        ),
        ({"losses": {"kind": "dpo"}}, "`losses.kind` must be one of"),
        ({"losses": {"kind": {"name": "ipo", "gamma": 1}}}, r"\(`losses.kind`\), got 1; it has"),
        ({"lr": -1e-5}, "Invalid learning rate: -1e-05"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` must be a positive number, got 0.0"),
        ({"data": []}, "`data` must name at least one file"),
        ({"concise": "short"}, "`concise` must be one of the objectives in `weights`, got 'short'"),
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"eval_every": 0}, "`eval_every` must be at least 1, got 0"),
        ({"warmup_ratio": 1.1}, r"`warmup_ratio` must be in \[0, 1\], got 1.1"),
        ({"schedule": "step"}, r"`schedule` must be one of \['constant', 'cosine', 'linear'\]"),
        ({"gradient_mode": "both"}, r"`gradient_mode` must be one of \['auto', .*got 'both'"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_loaded(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_tensorboard_that_is_not_installed_is_noticed_at_once(make_config, monkeypatch):
    from raco_fast.dpo.run import config

    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package tensorboard; pip install"):
        make_config(tensorboard=True)


def test_concise_is_derived_from_length(make_config, settings):
    config = make_config(weights={"sure": 0.5, "short": 0.5}, concise="short", max_steps=1)
    runner = Trainer(config)
    assert json.loads(Path(settings["data"][0]["path"]).read_text().splitlines()[0])["id"]
    for pair in runner.pairs:
        a, b = len(pair.a_ids), len(pair.b_ids)
        assert pair.labels["short"] in (0, (b > a) - (a > b))
        assert (pair.labels["short"] != 0) == (abs(a - b) >= 3)
    assert labelled_counts(runner.pairs, ["short"])["short"] > 5
    runner.run()
