"""Runs whose losses, gradients or weights stop being finite, and models that never were."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from raco_fast.cli import program as cli
from raco_fast.dpo.run import step as step_module
from raco_fast.dpo.run.checkpoint import latest, read_state
from raco_fast.dpo.run.divergence import DivergedError
from raco_fast.dpo.run.metrics_file import read_records
from raco_fast.dpo.run.trainer import Trainer, train

BAD_INPUT = 2


@pytest.fixture
def nan_losses(monkeypatch):
    """A function that makes the loss of `kind` NaN in the steps (from 1) of a set."""
    original, seen = step_module.preference_losses, []

    def break_at(steps: set[int]) -> None:
        seen.clear()

        def losses(scores, labels, **options):
            result = original(scores, labels, **options)
            if seen[-1] in steps:
                result["kind"] = result["kind"] * math.nan
            return result

        monkeypatch.setattr(step_module, "preference_losses", losses)

    of_step = step_module.labelled_counts

    def counting(*args):
        seen.append(1 + (seen[-1] if seen else 0))
        return of_step(*args)

    monkeypatch.setattr(step_module, "labelled_counts", counting)
    return break_at


@pytest.fixture
def plain(save_tiny) -> dict:
    return {"name": str(save_tiny()), "dropout": False}


@pytest.fixture
def command(settings, tmp_path, capfd):
    """A function that runs `raco-fast train` in this process: (exit status, stdout, stderr)."""
    root, own = logging.getLogger(), logging.getLogger("raco_fast")
    before = (list(root.handlers), own.level)

    def run(*arguments: str, **changes) -> tuple[int, str, str]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(settings | changes))
        status = cli.main(["train", str(file), *arguments])
        return status, *capfd.readouterr()

    yield run
    root.handlers[:], own.level = before


def test_a_run_ends_after_so_many_skipped_steps_in_a_row(runs, make_config, plain, nan_losses):
    nan_losses({2, 4, 5, 6, 7, 8})
    config = make_config(plain, max_skipped_steps=3, save_every=1, eval_data=[])
    runner = Trainer(config)
    with pytest.raises(DivergedError, match="stopped after step 6: the last 3 steps were all") as e:
        runner.run()
    left = latest(config.folder / "checkpoints")
    assert left.name == "step-00000003"  # the last one before them, and not written over
    for text in ("of 'kind' is not finite", f"{left} is left to resume from", "no model is saved"):
        assert text in str(e.value)
    assert not (config.folder / "model").exists()
    assert [r["loss/kind"] is None for r in runs.steps(config)] == [False, True, False, *[True] * 3]
    saved = runs.weights(config)
    assert all(torch.equal(saved[n], p) for n, p in runner.model.named_parameters())


def test_skipped_steps_are_counted_over_a_resume(runs, make_config, plain, nan_losses, monkeypatch):
    nan_losses({3, 4, 5})
    config = make_config(plain, max_skipped_steps=3, eval_data=[])
    runs.interrupt_after(monkeypatch, 4)
    with pytest.raises(Exception, match="stopped after step 4"):
        train(config)
    assert read_state(latest(config.folder / "checkpoints"))["skipped_in_a_row"] == 2
    runs.interrupt_after(monkeypatch, None)
    with pytest.raises(DivergedError, match="stopped after step 5: the last 3 steps"):
        train(config, resume=True)


def test_none_ends_no_run(make_config, plain, nan_losses):
    nan_losses(set(range(1, 10)))
    last = train(make_config(plain, max_skipped_steps=None))
    assert last["step"] == 10
    assert math.isfinite(last["eval_loss/kind"])


def test_a_run_that_ends_on_skipped_steps_is_not_done(command, plain, nan_losses, settings):
    nan_losses({9, 10})
    status, out, err = command(model=settings["model"] | plain, eval_data=[])
    assert status == BAD_INPUT
    assert "saved" not in out
    assert "its last 2 step(s) were skipped" in err
    assert f"{settings['output_dir']}/model holds the weights from before them" in err
    card = (Path(settings["output_dir"]) / "model" / "README.md").read_text()
    assert (
        "10 steps, 2 of them skipped (a loss or gradient was not finite), also the last 2" in card
    )
    status, _, err = command("--resume", model=settings["model"] | plain, eval_data=[])
    assert status == BAD_INPUT
    assert "its last 2 step(s) were skipped" in err


def test_a_run_without_a_single_step_saves_no_model(command, plain, nan_losses, settings):
    nan_losses(set(range(20)))
    status, _, err = command(model=settings["model"] | plain, max_steps=2)
    assert status == BAD_INPUT
    assert "its last 2 step(s) were skipped" in err
    assert "nothing was learnt" in err
    assert not (Path(settings["output_dir"]) / "model").exists()


def test_an_update_that_destroys_the_weights_is_not_saved(make_config, plain):
    config = make_config(plain, save_every=1, warmup_ratio=0.0, eval_data=[])
    runner = Trainer(config)
    step = runner._step

    def destroying(progress) -> None:
        step(progress)
        if runner.state.step == 3:
            with torch.no_grad():
                runner.model.lm_head.weight[2, 3] = math.inf

    runner._step = destroying
    with pytest.raises(
        DivergedError, match=r"after step 3 trained weights .* 'lm_head\.weight'"
    ) as e:
        runner.run()
    assert latest(config.folder / "checkpoints").name == "step-00000002"
    assert "step-00000002 is left to resume from" in str(e.value)


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_model_that_is_not_finite_is_refused_and_named(make_config, save_tiny, value, lora):
    folder = save_tiny()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = make_config({"name": str(folder), "lora": lora})
    with pytest.raises(
        ValueError, match=r"`model\.name` must name a model with finite weights"
    ) as e:
        Trainer(config)
    assert "'model.layers.1.mlp.up_proj." in str(e.value).replace("base_model.model.", "")
    assert "1 parameter(s)" in str(e.value)


def test_an_evaluation_that_is_not_finite_says_so(command, plain, settings, monkeypatch, caplog):
    """The policy is finite, its scores of the held-out pairs are not."""
    from raco_fast.dpo.run import evaluation

    original = evaluation.pair_logps
    monkeypatch.setattr(evaluation, "pair_logps", lambda *a: original(*a) + math.nan)
    status, out, _ = command(model=settings["model"] | plain, max_steps=1)
    assert status == 0
    assert "eval_rewards/accuracies/sure  nan" in out
    assert "held-out pairs of 'kind', 'sure' have scores that are not finite" in caplog.text
    last = read_records(Path(settings["output_dir"]) / "metrics.jsonl")[-1]
    for name in (
        "rewards/accuracies/sure",
        "logps/accuracies",
        "rewards/margins/kind",
        "loss/sure",
    ):
        assert last[f"eval_{name}"] is None
