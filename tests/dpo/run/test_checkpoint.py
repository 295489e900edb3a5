"""Interrupted, resumed and refused runs; checkpoints on a full disk."""

from dataclasses import replace

import pytest
import torch

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.run import checkpoint as checkpoint_module
from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.metrics_file import read_records
from raco_fast.dpo.run.trainer import Interrupted, Trainer, train

LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}


@pytest.mark.parametrize("lora", [None, LORA["lora"]], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    runs, make_config, monkeypatch, tmp_path, lora
):
    """Attention and adapter dropout on, accumulation on, stopped twice in mid-epoch."""
    whole, cut = (
        make_config({"lora": lora}, output_dir=str(tmp_path / name), eval_every=4, save_every=4)
        for name in ("whole", "cut")
    )
    runs.interrupt_after(monkeypatch, None)
    result = train(whole)
    for stop, at in ((3, 3), (4, 7)):
        runs.interrupt_after(monkeypatch, stop)
        with pytest.raises(
            Interrupted, match=rf"stopped after step {at}; .*step-0000000{at} .* --resume"
        ):
            train(cut, resume=at == 7)
        assert [p.name for p in (cut.folder / "checkpoints").iterdir()] == [f"step-{at:08}"]
    # As if the process had been killed while writing a record after the checkpoint.
    with (cut.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "epoch": 1.6}\n{"step": 9, "ep')
    runs.interrupt_after(monkeypatch, None)
    resumed = Trainer(cut, resume=True)
    assert resumed.state.step == 7
    assert resumed.run() == result
    runs.assert_same_run(whole, cut)
    assert [r["step"] for r in runs.steps(cut)] == list(range(1, 11))
    # A finished run: nothing is trained, the model is saved again.
    assert train(cut, resume=True) == result
    runs.assert_same_run(whole, cut)


def test_a_rule_with_a_memory_is_resumed(runs, make_config, monkeypatch, tmp_path):
    rule = {"name": "gradvac", "beta": 0.2}
    whole, cut = (make_config(rule=rule, output_dir=str(tmp_path / n)) for n in ("whole", "cut"))
    runs.interrupt_after(monkeypatch, None)
    train(whole)
    runs.interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(cut)
    runs.interrupt_after(monkeypatch, None)
    resumed = Trainer(cut, resume=True)
    assert resumed.state.optimizer.rule_state["values"]["steps"] == 3.0
    resumed.run()
    runs.assert_same_run(whole, cut)


def test_a_checkpoint_of_another_configuration_is_refused_naming_every_difference(
    runs, make_config, monkeypatch
):
    runs.interrupt_after(monkeypatch, 1)
    config = make_config()
    with pytest.raises(Interrupted):
        train(config)
    changed = make_config(LORA, lr=0.5, weights={"sure": 0.6, "kind": 0.4})
    with pytest.raises(ValueError, match="belongs to another configuration") as error:
        train(changed, resume=True)
    message = str(error.value)
    assert "lr: 0.01 in the checkpoint, 0.5 now" in message
    assert "weights: {'sure': 0.7, 'kind': 0.3} in the checkpoint, {'sure': 0.6" in message
    assert "model.lora: None in the checkpoint, {'r': 4" in message
    assert "beta" not in message
    free = make_config(eval_every=3, save_every=2, log_every=5, eval_data=[])
    assert Trainer(free, resume=True).state.step == 1


def test_a_checkpoint_of_other_data_or_another_model_is_refused(
    runs, make_config, monkeypatch, write_pairs, save_tiny
):
    file = write_pairs("mine.jsonl", 12, 1, {"sure": "yes", "kind": "calm"})
    folder = save_tiny(seed=1)
    config = make_config({"name": str(folder)}, data=[{"path": str(file)}])
    runs.interrupt_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train(config)
    text = file.read_text()
    file.write_text(text.replace('"sure": 1', '"sure": 0', 1))
    with pytest.raises(ValueError, match="was made with another data: the settings agree"):
        train(config, resume=True)
    file.write_text(text)
    save_tiny(seed=2).joinpath("model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match="was made with another model: the settings agree"):
        train(config, resume=True)


def test_a_used_folder_is_not_mixed_with_a_new_run(make_config):
    config = make_config(max_steps=1)
    with pytest.raises(ValueError, match=r"`resume`: there is no checkpoint under .*checkpoints"):
        train(config, resume=True)
    train(config)
    with pytest.raises(
        ValueError, match=r"`output_dir` already holds .*step-00000001; add --resume"
    ):
        train(config)
    latest(config.folder / "checkpoints").parent.rename(config.folder / "moved")
    with pytest.raises(ValueError, match="`output_dir` already holds a trained model"):
        train(config)
    with pytest.raises(ValueError, match="`resume` goes on with a run and `overwrite` removes it"):
        train(config, resume=True, overwrite=True)


def test_overwrite_removes_the_old_run_and_nothing_else(make_config):
    config = make_config(max_steps=2)
    train(config)
    notes = config.folder / "notes.txt"
    notes.write_text("mine")
    train(replace(config, max_steps=1), overwrite=True)
    assert latest(config.folder / "checkpoints").name == "step-00000001"
    assert [path.name for path in (config.folder / "checkpoints").iterdir()] == ["step-00000001"]
    assert {record["step"] for record in read_records(config.folder / "metrics.jsonl")} == {0, 1}
    assert notes.read_text() == "mine"


def test_overwrite_keeps_the_old_run_where_the_new_one_cannot_begin(make_config):
    config = make_config(max_steps=1)
    train(config)
    before = sorted(config.folder.rglob("*"))
    own = replace(config, model=replace(config.model, name=str(config.folder / "model")))
    with pytest.raises(ValueError, match=r"`model.name` is in the `output_dir` that --overwrite"):
        train(own, overwrite=True)
    nowhere = replace(config, data=[DataSource("nowhere.jsonl")])
    with pytest.raises(OSError, match="nowhere"):
        train(nowhere, overwrite=True)
    assert sorted(config.folder.rglob("*")) == before


@pytest.mark.parametrize("failing", ["optimizer.pt", "rng.pt"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    runs, make_config, monkeypatch, tmp_path, failing
):
    whole, config = (
        make_config(output_dir=str(tmp_path / name), save_every=2) for name in ("whole", "cut")
    )
    train(whole)
    original, written = torch.save, []

    def save(content, file):
        written.append(file)
        if file.name == failing and sum(f.name == failing for f in written) == 3:
            file.write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")
        original(content, file)

    monkeypatch.setattr(checkpoint_module.torch, "save", save)
    with pytest.raises(OSError, match=r"checkpoint .*step-00000006 could not be written") as error:
        train(config)
    assert "free some space" in str(error.value)
    assert "add --resume to go on from" in str(error.value)
    assert "step-00000004" in str(error.value)
    assert [p.name for p in (config.folder / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    train(config, resume=True)
    runs.assert_same_run(whole, config)


def test_a_full_disk_at_the_first_checkpoint_says_so(make_config, monkeypatch):
    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", save)
    with pytest.raises(OSError, match=r"No space left on device.*, then start again"):
        train(make_config(save_every=1))


def test_parameters_of_another_model_are_not_loaded(make_config):
    full, lora = Trainer(make_config()), Trainer(make_config(LORA))
    saved = full.state.save(full.config.folder / "checkpoints")
    with pytest.raises(ValueError, match="must hold the trained parameters of this model, but"):
        lora.state.load(saved)
