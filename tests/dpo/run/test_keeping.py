"""When checkpoints are written and which ones stay."""

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from launched_runs import Started, assert_done

from raco_fast.dpo.run import keeping
from raco_fast.dpo.run.checkpoint import checkpoints_in
from raco_fast.dpo.run.keeping import Best, evaluated
from raco_fast.dpo.run.trainer import Interrupted, Trainer, train

SHORT = {"pairs_per_step": 4, "pairs_per_micro_batch": 4, "check_every": None}


def kept(config) -> list[int]:
    return [
        int(path.name.removeprefix("step-"))
        for path in checkpoints_in(config.folder / "checkpoints")
    ]


def test_a_checkpoint_every_so_many_minutes_of_the_clock(make_config, monkeypatch):
    """Steps of 40 s: after the 3rd two minutes are over, and again after the 6th."""
    clock, seen = [1000.0], []
    step = Trainer._step

    def slow(self, progress):
        seen.append(kept(self.config))
        step(self, progress)
        clock[0] += 40.0

    monkeypatch.setattr(keeping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Trainer, "_step", slow)
    config = make_config(**SHORT, max_steps=7, save_minutes=2, keep=3)
    train(config)
    assert seen == [[], [], [], [3], [3], [3], [3, 6]]
    assert kept(config) == [3, 6, 7]
    seen.clear()
    other = make_config(**SHORT, max_steps=7, save_minutes=None, output_dir=config.output_dir + "2")
    train(other)
    assert seen == [[]] * 7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_clock_of_one_process_decides_for_all(settings, tmp_path, kind):
    file = tmp_path / "config.yaml"
    changes = {"parallel": {"kind": kind}, "max_steps": 4, "save_minutes": 1e-9, "keep": 9}
    changes |= {"eval_every": 1, "keep_best": "sure"}
    file.write_text(yaml.safe_dump(settings | changes))
    with Started(("train", str(file)), processes=2, folder=tmp_path) as started:
        assert_done(started.end())
    found = checkpoints_in(Path(settings["output_dir"]) / "checkpoints")
    assert [path.name[-1] for path in found] == ["1", "2", "3", "4"]


def test_half_an_hour_is_the_default(make_config):
    assert (make_config().save_minutes, make_config().keep, make_config().keep_best) == (
        30,
        1,
        None,
    )


def test_the_newest_and_the_best_stay_also_after_a_resume(make_config, monkeypatch, runs, caplog):
    """The held-out losses are given: the best of `kind` comes second, then fourth."""
    losses = {1: 0.6, 2: 0.5, 3: math.nan, 4: 0.4, 5: 0.4, 6: 0.7, 7: 0.9}
    caplog.set_level(logging.INFO, "raco_fast")
    evaluated_at = give_losses(losses, monkeypatch)
    config = make_config(**SHORT, max_steps=7, eval_every=1, keep_best="kind")
    runs.interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(config)
    assert kept(config) == [2, 3]
    runs.interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(config, resume=True)
    assert kept(config) == [4, 6]
    runs.interrupt_after(monkeypatch, None)
    train(config, resume=True)
    assert kept(config) == [4, 7]
    assert evaluated_at == [1, 2, 3, 4, 5, 6, 7]
    assert re.search("the smallest eval_loss/kind, 0.4, is that of .*step-00000004", caplog.text)


def give_losses(losses, monkeypatch) -> list[int]:
    """Give every evaluation the loss of its step; the steps that were evaluated."""
    from raco_fast.dpo.run.evaluation import HeldOut

    seen: list[int] = []
    step = Trainer._step
    at = SimpleNamespace(step=0)

    def stepped(self, progress):
        step(self, progress)
        at.step = self.state.step

    original = HeldOut.evaluate

    def evaluate(self, model, stopped):
        result = original(self, model, stopped)
        if result is None:  # stopped
            return None
        seen.append(at.step)
        return result | {"eval_loss/kind": losses[at.step]}

    monkeypatch.setattr(Trainer, "_step", stepped)
    monkeypatch.setattr(HeldOut, "evaluate", evaluate)
    return seen


def test_losses_on_other_pairs_and_of_other_objectives_are_not_compared(tmp_path):
    notes = {
        1: evaluated({"step": 1, "eval_loss/a": 0.1, "eval_loss/b": 0.5}, "old"),
        2: evaluated({"step": 2, "eval_loss/a": 0.3, "eval_loss/b": math.nan}, "new"),
        3: None,
        4: evaluated({"step": 4, "eval_loss/a": 0.3, "eval_loss/b": 0.9}, "new"),
    }
    for step, note in notes.items():
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"step": step, "evaluation": note}))
    assert Best("a", "new").among(tmp_path) == (0.3, tmp_path / "step-00000002")  # the older one
    assert Best("b", "new").among(tmp_path) == (0.9, tmp_path / "step-00000004")
    assert Best("a", "old").among(tmp_path) == (0.1, tmp_path / "step-00000001")
    assert Best("a", "none").among(tmp_path) is None
    for loss, better in ((0.2, True), (0.3, False), (0.4, False), (math.nan, False), (0.0, True)):
        now = evaluated({"eval_loss/a": loss}, "new")
        assert Best("a", "new").beaten(tmp_path, now) == better, loss
    assert not Best("a", "new").beaten(tmp_path, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_minutes": 0.0}, "`save_minutes` must be a positive number of minutes, got 0.0"),
        (
            {"save_minutes": math.nan},
            "`save_minutes` must be a positive number of minutes, got nan",
        ),
        ({"keep": 0}, "`keep` must be at least 1, got 0"),
        ({"keep_best": "nice", "eval_every": 2}, "`keep_best` must be one of .*, got 'nice'"),
        ({"keep_best": "kind"}, "`keep_best` compares evaluations, so .* got 1 files and None"),
        ({"keep_best": "kind", "eval_every": 2, "eval_data": []}, "must be set, got 0 files and 2"),
    ],
)
def test_wrong_settings_are_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_keep_best_needs_held_out_labels(make_config, write_pairs):
    file = write_pairs("held_out.jsonl", 8, 3, {"sure": "yes", "kind": "never"})
    config = make_config(eval_data=[{"path": str(file)}], eval_every=2, keep_best="kind")
    with pytest.raises(ValueError, match="`keep_best` names 'kind', but no pair of `eval_data`"):
        Trainer(config)
