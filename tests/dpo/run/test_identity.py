"""What may change where a run goes on from a checkpoint: every setting has its class."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from raco_fast.dpo.run.checkpoint import latest, read_state
from raco_fast.dpo.run.identity import (
    CHANGES,
    Change,
    change_of,
    check_same_content,
    check_same_run,
    identity,
    keys_of,
)
from raco_fast.dpo.run.trainer import Trainer, train

GROUPS_OF_ONE_KIND = {"eval_data", "parallel", "model.lora", "tokens.plain", "reference"}


def test_every_setting_is_classified_and_nothing_else_is():
    keys = set(keys_of())
    assert {"lr", "model.name", "model.lora.r", "data.path", "tokens.plain.user"} <= keys
    prefixes = {".".join(key.split(".")[:n]) for key in keys for n in range(1, 4)}
    listed = {p for p in prefixes if p in CHANGES}
    forgotten = [key for key in keys if key not in CHANGES and not _in_group(key)]
    assert forgotten == [], "say in CHANGES what another value of it means for a resumed run"
    assert set(CHANGES) - listed == set(), "no setting has this name"


def _in_group(key: str) -> bool:
    return any(key.startswith(f"{group}.") for group in GROUPS_OF_ONE_KIND)


def test_the_page_has_every_setting_once():
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    table = page.partition("## What may change")[2].partition("## Damaged")[0]
    named = re.findall(r"`([a-z0-9_.]+)`", "".join(re.findall(r"^\|.*$", table, re.MULTILINE)))
    assert sorted(named) == sorted(CHANGES)


def test_what_is_unknown_may_not_change():
    assert change_of("lost") is Change.NEVER
    assert change_of("model.lost") is Change.NEVER
    assert change_of("parallel.shard") is Change.FREE


def stopped(runs, make_config, monkeypatch, *args, after: int = 4, **changes):
    """The config of a run that was interrupted after some steps."""
    from raco_fast.dpo.run.trainer import Interrupted

    config = make_config(*args, **changes)
    runs.interrupt_after(monkeypatch, after)
    with pytest.raises(Interrupted):
        train(config)
    monkeypatch.undo()
    return config


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"gradient_checkpointing": True}, {"pairs_per_micro_batch": 8, "chunk_tokens": 64}),
        pytest.param({}, {"pairs_per_micro_batch": 1}, marks=pytest.mark.slow),
        pytest.param(
            {}, {"pairs_per_micro_batch": 8, "gradient_mode": "gram_first"}, marks=pytest.mark.slow
        ),
        pytest.param({}, {"chunk_tokens": 3, "check_every": 5}, marks=pytest.mark.slow),
        pytest.param({}, {"gradient_mode": "autograd"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_changes_no_step_but_by_rounding_may_change(
    runs, make_config, monkeypatch, save_tiny, tmp_path, model, changes
):
    plain = {"name": str(save_tiny(attention_dropout=0.0)), "dropout": False}
    short = {"eps": 1e-3, "max_steps": 5}
    whole = make_config(plain, output_dir=str(tmp_path / "whole"), **short)
    train(whole)
    stopped(runs, make_config, monkeypatch, plain, after=2, **short)
    config = make_config(plain | model, **short, **changes)
    train(config, resume=True)
    for name, weight in runs.weights(whole).items():
        torch.testing.assert_close(runs.weights(config)[name], weight, rtol=1e-5, atol=1e-5)


def test_paths_may_be_written_otherwise(runs, make_config, monkeypatch, settings, tmp_path, caplog):
    config = stopped(runs, make_config, monkeypatch)
    rows = Path(settings["data"][0]["path"])
    other = tmp_path / "renamed.jsonl"
    other.symlink_to(rows)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(rows.parent)
    shutil.copytree(settings["model"]["name"], tmp_path / "copied model")
    caplog.set_level("INFO")
    Trainer(
        make_config(
            {"name": "~/copied model"},
            data=[{"path": "~/renamed.jsonl", "limit": 40}],
            eval_data=[{"path": f"./{Path(settings['eval_data'][0]['path']).name}"}],
            output_dir="~/run",
            cache_dir="~/cache",
        ),
        resume=True,
    )
    assert "going on with other settings: cache_dir: " in caplog.text
    assert "dropout may draw other numbers" in caplog.text
    assert "the held-out pairs are others" not in caplog.text
    assert config.folder == tmp_path / "run"


def test_rows_without_ids_are_the_same_in_a_renamed_file(
    runs, make_config, monkeypatch, write_pairs
):
    file = write_pairs("one.jsonl", 16, 1, {"sure": "yes", "kind": "calm"})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**r, "id": None}) + "\n" for r in rows))
    stopped(runs, make_config, monkeypatch, data=[{"path": str(file)}], after=2)
    moved = file.rename(file.with_name("two.jsonl"))
    Trainer(make_config(data=[{"path": str(moved)}]), resume=True)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({}, {"lr": 0.02}, r"\(lr: 0.01 in the checkpoint, 0.02 now\); restore these settings or"),
        ({}, {"seed": 5}, r"\(seed: 4 in the checkpoint, 5 now\)"),
        ({}, {"weights": {"sure": 0.6, "kind": 0.4}}, r"weights: {'sure': 0.7, 'kind': 0.3} in"),
        ({}, {"pairs_per_step": 4}, "pairs_per_step: 8 in the checkpoint, 4 now"),
        ({"dtype": "bf16"}, {}, "model.dtype: 'fp32' in the checkpoint, 'bf16' now"),
        ({"dropout": False}, {}, "model.dropout: True in the checkpoint, False now"),
        ({"lora": {"r": 2}}, {}, r"model.lora: None in the checkpoint, {'r': 2"),
        ({}, {"rounding": "split"}, "rounding: 'stochastic' in the checkpoint, 'split' now"),
        ({}, {"losses": {"kind": "ipo"}}, "losses: "),
        ({}, {"schedule": "cosine", "c": 0.1}, r"\(c: 0.4 in .*, 0.1 now; schedule: 'linear' in"),
    ],
    ids=str,
)
def test_another_run_is_refused_by_name(make_config, tmp_path, model, changes, message):
    with pytest.raises(ValueError, match=message):
        check_same_run(make_config(model, **changes), identity(make_config()), tmp_path)


def test_settings_of_other_versions(make_config, tmp_path):
    """One that is new here had its default; one that is gone may have meant anything."""
    saved = identity(make_config())
    del saved["c"], saved["model"]["dropout"], saved["save_every"]
    check_same_run(make_config({"dropout": False}, save_every=3), saved, tmp_path)
    with pytest.raises(ValueError, match=r"\(c: 0.4 in the checkpoint, 0.1 now\)"):
        check_same_run(make_config({"dropout": False}, c=0.1), saved, tmp_path)
    with pytest.raises(ValueError, match=r"\(magic: 3 in the checkpoint, None now\)"):
        check_same_run(make_config({"dropout": False}), {**saved, "magic": 3}, tmp_path)


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        (
            "data",
            {"tokens": {"max_length": 12}},
            r"data \(tokens.max_length: 1024 in the che",
        ),
        ("data", {"data": [{"path": "x", "limit": 3}]}, r"data.limit: \[None\] in .*, \[3\] now"),
        ("model", {"model": {"name": "org/other"}}, r"with another model \(model.name: '"),
        ("data", {"model": {"tokenizer": "org/t"}}, r"\(model.tokenizer: None in the checkpoint"),
        ("data", {}, "another data: the settings agree but its content changed; restore it or"),
        ("model", {}, "another model: the settings agree but its content changed; restore it"),
    ],
    ids=str,
)
def test_other_content_is_refused_with_the_setting_that_differs(
    make_config, tmp_path, what, changes, message
):
    saved = {"settings": identity(make_config()), "data": "1", "model": "1"}
    config = make_config(**changes)
    check_same_content(config, what, saved, saved, tmp_path)
    with pytest.raises(ValueError, match=message):
        check_same_content(config, what, saved, {**saved, what: "2"}, tmp_path)


@pytest.mark.parametrize("what", ["data", "model"])
def test_a_whole_run_is_refused_for_its_content(
    runs, make_config, monkeypatch, settings, save_tiny, what
):
    stopped(runs, make_config, monkeypatch, after=1)
    changes = {
        "data": {"data": [settings["data"][0] | {"limit": 30}]},
        "model": {"model": {"name": str(save_tiny(seed=3, attention_dropout=0.1))}},
    }[what]
    with pytest.raises(ValueError, match=f"was made with another {what} "):
        Trainer(make_config(**changes), resume=True)


@pytest.mark.parametrize(
    "schedule",
    ["cosine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "constant"))],
)
def test_a_longer_run_takes_up_the_longer_schedule(
    runs, make_config, monkeypatch, caplog, schedule
):
    caplog.set_level("INFO")
    arguments = {"schedule": schedule, "warmup_ratio": 0.2}
    stopped(runs, make_config, monkeypatch, **arguments)
    longer = make_config(epochs=3, **arguments)
    train(longer, resume=True)
    assert "the run has 15 steps instead of 10" in caplog.text
    assert "are those of 15 steps, taken up at step 4" in caplog.text
    ahead = torch.optim.SGD([torch.zeros(1)], lr=longer.lr)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    expected, plan = [], get_scheduler(name, ahead, 3, 15)
    for _ in range(15):
        expected += plan.get_last_lr()
        ahead.step()
        plan.step()
    rates = [r["learning_rate"] for r in runs.steps(longer)]
    assert rates[4:] == expected[4:]
    assert rates[:4] != expected[:4]
    assert read_state(latest(longer.folder / "checkpoints"))["run"]["total_steps"] == 15


def test_a_finished_run_goes_on_with_more_epochs(runs, make_config):
    train(make_config(epochs=1))
    last = train(make_config(), resume=True)
    assert last["step"] == 10
    numbers = [r["step"] for r in runs.steps(make_config())]
    assert numbers == list(range(1, 11))


def test_fewer_steps_are_possible_as_long_as_they_are_not_done(runs, make_config, monkeypatch):
    stopped(runs, make_config, monkeypatch)
    with pytest.raises(
        ValueError, match=r"must give at least the 4 steps that .*004 has done, got 3"
    ):
        Trainer(make_config(max_steps=3), resume=True)
    assert train(make_config(max_steps=4), resume=True)["step"] == 4


@pytest.mark.parametrize("saved", ["nearest", "split"])
def test_without_a_rounding_of_its_own_a_run_keeps_the_checkpoints(
    runs, make_config, monkeypatch, saved
):
    stopped(runs, make_config, monkeypatch, {"dtype": "bf16"}, after=1, rounding=saved)
    runner = Trainer(make_config({"dtype": "bf16"}), resume=True)
    assert runner.state.optimizer.rounding == saved
    assert runner.state.run["settings"]["rounding"] == saved
    with pytest.raises(
        ValueError, match=f"rounding: '{saved}' in the checkpoint, 'stochastic' now"
    ):
        Trainer(make_config({"dtype": "bf16"}, rounding="stochastic"), resume=True)


def before_and_after(config) -> list[str]:
    card = (config.folder / "model" / "README.md").read_text()
    return [line for line in card.splitlines() if line.startswith(("| sure |", "| kind |"))][-2:]


@pytest.mark.parametrize("finished", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_card_compares_evaluations_of_the_same_pairs(
    runs, make_config, monkeypatch, write_pairs, tmp_path, caplog, finished
):
    """A run resumed with other held-out pairs: its table is that of a run that always had them."""
    other = write_pairs("other.jsonl", 23, 9, {"sure": "yes", "kind": "calm"})
    with_other = {"eval_data": [{"path": str(other)}]}
    with_other["max_steps"] = 5
    whole = make_config(output_dir=str(tmp_path / "whole"), **with_other)
    train(whole)
    caplog.set_level("INFO")
    if finished:
        train(make_config(max_steps=5))
    else:
        stopped(runs, make_config, monkeypatch, max_steps=5)
    config = make_config(**with_other)
    assert train(config, resume=True) == train(whole, resume=True)
    assert before_and_after(config) == before_and_after(whole)
    assert "the held-out pairs are others than those of the checkpoint" in caplog.text
