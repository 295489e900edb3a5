"""How a run lays out its pairs: the same steps whichever way, and what is refused or told."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import model_zoo
import pytest
import torch
import yaml
from launched_runs import Started, assert_done
from quick_cases import matrix

from raco_fast.dpo.run import reference_cache
from raco_fast.dpo.run.trainer import Trainer, train

LORA = {"lora": {"r": 4, "alpha": 8}}
WAYS = {
    "pairs": {},
    "pairs, each alone": {"tokens_per_micro_batch": 1},
    "pairs, all at once": {"tokens_per_micro_batch": 10**6},
    "packed": {"batching": "packed", "tokens_per_micro_batch": 70},
    "packed, all at once": {"batching": "packed", "tokens_per_micro_batch": 10**6},
}


@pytest.fixture
def run(runs, make_config, save_tiny, tmp_path):
    """A function that trains for two steps into a folder of its own."""
    plain = {"name": str(save_tiny()), "dropout": False}
    made: list[int] = []

    def begin(model=None, **changes):
        made.append(1)
        options = {"max_steps": 2, "eps": 1e-3, "check_every": 1, "eval_data": []} | changes
        config = make_config(
            plain | (model or {}), output_dir=str(tmp_path / f"run-{len(made)}"), **options
        )
        runner = Trainer(config)
        runner.run()
        return SimpleNamespace(
            config=config,
            kind=runner.layout.kind,
            steps=runs.steps(config),
            evaluations=runs.evaluations(config),
            weights=runs.weights(config),
        )

    return begin


def assert_close(a, b) -> None:
    for one, two in zip(a.steps, b.steps, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            # Rewards of the first step are rounding errors, of which nobody knows the signs.
            if one["step"] > 1 or "accuracies" not in name:
                assert one[name] == pytest.approx(two[name], rel=2e-4, abs=2e-5), name
    for name, weight in a.weights.items():
        torch.testing.assert_close(weight, b.weights[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ways", [("pairs", "packed"), pytest.param(tuple(WAYS), marks=pytest.mark.slow)], ids=len
)
def test_the_layout_changes_nothing_but_rounding(run, ways):
    padded = run(batching="padded")
    assert padded.kind == "padded"
    for way in ways:
        other = run(**WAYS[way])
        assert other.kind == way.split(",")[0]
        assert_close(other, padded)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["autograd", "gram_first"])
def test_other_modes_on_packed_rows(run, mode):
    of_step = {"pairs_per_micro_batch": 8} if mode == "gram_first" else {}
    both = [run(batching=b, gradient_mode=mode, **of_step) for b in ("auto", "padded")]
    assert [each.kind for each in both] == ["pairs", "padded"]
    assert_close(*both)


@pytest.mark.slow
def test_losses_of_several_tails_on_packed_rows(run):
    losses = {"kind": {"name": "ld", "alpha": 0.3}}
    both = [run(batching=b, losses=losses) for b in ("auto", "padded")]
    assert [each.kind for each in both] == ["pairs", "padded"]
    assert_close(*both)


QUICK = [("fp32", "full", "auto"), ("bf16", "lora", "auto")]


@pytest.mark.parametrize(
    ("dtype", "kind", "batching"),
    matrix(("fp32", "bf16"), ("full", "lora"), ("auto", "packed", "padded"), quick=QUICK),
)
def test_the_first_loss_is_ln_2_and_no_margin_is_seen_before(run, settings, dtype, kind, batching):
    """In several micro-batches, whose roundings the reference shares."""
    model = {"full": {}, "lora": LORA}[kind]
    few = {"pairs_per_micro_batch": 3} if batching == "padded" else {"tokens_per_micro_batch": 50}
    held_out = {"eval_data": settings["eval_data"]}
    of_run = run({"dtype": dtype, **model}, batching=batching, max_steps=1, **few, **held_out)
    within = 1e-6 if dtype == "fp32" else 1e-3
    for name in ("sure", "kind"):
        assert of_run.steps[0][f"loss/{name}"] == pytest.approx(math.log(2), abs=within)
        assert of_run.evaluations[0][f"eval_rewards/margins/{name}"] == 0.0
        assert of_run.evaluations[0][f"eval_loss/{name}"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_the_first_loss_is_ln_2_on_two_processes(runs, settings, save_tiny, tmp_path, kind):
    model = settings["model"] | {"name": str(save_tiny()), "dropout": False}
    changes = {"model": model, "max_steps": 2, "tokens_per_micro_batch": 50}
    values = settings | changes | {"parallel": {"kind": kind}, "log_every": 1}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    with Started(("train", str(file)), 2, tmp_path) as started:
        assert_done(started.end())
    found = runs.steps(SimpleNamespace(folder=tmp_path / "run"))
    for name in ("sure", "kind"):
        assert found[0][f"loss/{name}"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(found[1][f"loss/{name}"] - math.log(2)) > 1e-5, "nothing was learnt"


def test_a_resumed_run_may_lay_out_its_pairs_otherwise(
    runs, make_config, save_tiny, monkeypatch, caplog
):
    """From the reference that there is, which the log says."""
    caplog.set_level(logging.INFO)
    config = {"name": str(save_tiny()), "dropout": False}
    scored = []
    original = reference_cache._scored
    monkeypatch.setattr(
        reference_cache, "_scored", lambda *a, **k: scored.append(1) or original(*a, **k)
    )
    with monkeypatch.context() as stopped:
        runs.interrupt_after(stopped, 2)
        with pytest.raises(Exception, match="stopped after step 2"):
            train(make_config(config, eval_data=[], max_steps=4))
    assert len(scored) == 1
    assert "in other micro-batches than those now" not in caplog.text
    resumed = make_config(config, eval_data=[], max_steps=4, batching="padded")
    train(resumed, resume=True)
    assert len(scored) == 1
    assert "reference log-probabilities were scored in other micro-batches" in caplog.text
    assert [record["step"] for record in runs.steps(resumed)] == [1, 2, 3, 4]


def test_the_reference_is_scored_once_for_all_tails(make_config, monkeypatch):
    passes = []
    original = reference_cache._scored
    monkeypatch.setattr(
        reference_cache, "_scored", lambda *a, **k: passes.append(a[5]) or original(*a, **k)
    )
    losses = {"kind": {"name": "ld", "alpha": 0.3}}
    runner = Trainer(make_config(losses=losses))
    assert passes == [(1.0, 0.3)] * 2  # training and held-out pairs
    assert list(runner.references) == [1.0, 0.3]
    assert list(runner.held_out.references) == [1.0, 0.3]


def test_losses_that_see_no_pair_have_a_prompt_for_every_response(run, caplog):
    caplog.set_level(logging.INFO)
    both = [run(batching=b, losses={"kind": "orpo"}) for b in ("auto", "padded")]
    assert [each.kind for each in both] == ["packed", "padded"]
    assert_close(*both)
    said = "every response has its prompt to itself, as the loss 'orpo' of 'kind' is no function"
    assert caplog.text.count(said) == 1


def test_pair_rows_are_refused_to_losses_that_see_no_pair(make_config):
    config = make_config(batching="pairs", losses={"kind": "nca"})
    with pytest.raises(
        ValueError, match=r"`batching` 'pairs' is not for these losses: the loss 'nca' of 'kind'"
    ):
        Trainer(config)


@pytest.mark.slow
def test_each_objective_by_a_pass_of_its_own_shares_rows_whatever_its_loss(run):
    """Autograd's own gradients need no direction in common."""
    both = [
        run(batching=b, losses={"kind": "nca"}, gradient_mode="autograd")
        for b in ("pairs", "padded")
    ]
    assert [each.kind for each in both] == ["pairs", "padded"]
    assert_close(*both)


def test_a_model_whose_tokens_meet_elsewhere_runs_padded_and_it_is_said_once(
    runs, make_config, tmp_path, tiny, caplog
):
    with model_zoo.quiet():
        model_zoo.build("mamba").save_pretrained(tmp_path / "mamba")
    model = {"name": str(tmp_path / "mamba"), "tokenizer": str(tiny), "dropout": False}
    with model_zoo.quiet():
        for batching in ("pairs", "packed"):
            with pytest.raises(
                ValueError,
                match=rf"`batching` '{batching}' cannot be used with `model.name` .*tokens",
            ):
                Trainer(make_config(model, batching=batching, eval_data=[]))
        runner = Trainer(make_config(model, eval_data=[], max_steps=1))
        runner.run()
    assert runner.layout.kind == "padded"
    assert caplog.text.count("`model` cannot be run on packed rows, so batches are padded") == 1
    (step,) = runs.steps(runner.config)
    assert step["loss/sure"] == pytest.approx(math.log(2), abs=2e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batching": "bins"}, "`batching` must be one of .*got 'bins'"),
        ({"tokens_per_micro_batch": 0}, "`tokens_per_micro_batch` must be .*got 0"),
        (
            {
                "tokens_per_micro_batch": 99,
                "gradient_mode": "gram_first",
                "pairs_per_micro_batch": 8,
            },
            "`tokens_per_micro_batch` must be null with `gradient_mode` 'gram_first'.* got 99",
        ),
    ],
)
def test_wrong_settings_are_refused(make_config, changes, match):
    with pytest.raises(ValueError, match=match):
        make_config(**changes)


def test_what_later_epochs_do_to_the_margins_is_recorded_once(run):
    """Pairs lie beside others then, and attention that computes whole rows, as where it is computed
    twice, adds up in another order; with each pair alone nothing moves.
    """
    several = {"epochs": 2, "max_steps": None}
    moved = run({"gradient_checkpointing": True}, **several)
    alone = run(tokens_per_micro_batch=1, **several)
    assert 0 < moved.steps[0]["reference/margin_noise"] < 1e-3
    assert alone.steps[0]["reference/margin_noise"] == 0
    assert not any("reference/margin_noise" in step for step in moved.steps[1:])
    assert "reference/margin_noise" not in run().steps[0]
