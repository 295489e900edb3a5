"""`model.dtype: auto` is settled when a run begins, and stays what it was."""

import logging

import pytest
from processes import run

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.run import weight_dtype
from raco_fast.dpo.run.checkpoint import latest, read_state
from raco_fast.dpo.run.trainer import Interrupted, Trainer, train
from raco_fast.dpo.run.weight_dtype import with_dtype

AUTO = {"dtype": "auto"}
SHORT = {"max_steps": 4, "eval_data": []}


@pytest.fixture
def machine(monkeypatch):
    """A function that sets what this machine is faster in; counts how often that is asked."""
    asked = []

    def set_faster(name):
        def measure(config, device, *, full):
            asked.append((config.hidden_size, device.type, full))
            return name, "measured"

        monkeypatch.setattr(weight_dtype, "faster_dtype", measure)

    set_faster("bf16")
    set_faster.asked = asked
    return set_faster


def dtypes(runner) -> set[str]:
    return {str(p.dtype).removeprefix("torch.") for p in runner.model.parameters()}


def test_a_run_that_is_resumed_elsewhere_goes_on_in_its_dtype(
    machine, make_config, runs, monkeypatch, tmp_path, caplog
):
    given = make_config({"dtype": "bf16"}, output_dir=str(tmp_path / "given"), **SHORT)
    cut = make_config(AUTO, output_dir=str(tmp_path / "cut"), **SHORT)
    train(given)
    runs.interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(cut)
    runs.interrupt_after(monkeypatch, None)
    assert machine.asked == [(24, "cpu", True)]
    saved = read_state(latest(cut.folder / "checkpoints"))
    assert saved["run"]["settings"]["model"]["dtype"] == "bf16"
    (cut.folder / "dtype.txt").unlink()
    machine("fp32")
    with caplog.at_level(logging.INFO, "raco_fast"):
        train(cut, resume=True)
    assert f"`model.dtype: auto` is bf16: as {cut.folder}" in caplog.text
    assert len(machine.asked) == 1
    runs.assert_same_run(given, cut)


def test_a_run_that_is_started_again_has_the_dtype_it_began_with(machine, make_config, caplog):
    config = make_config(AUTO, **SHORT)
    with caplog.at_level(logging.INFO, "raco_fast"):
        assert dtypes(Trainer(config)) == {"bfloat16"}
    assert "`model.dtype: auto` is bf16: measured" in caplog.text
    machine("fp32")
    with caplog.at_level(logging.INFO, "raco_fast"):
        assert dtypes(Trainer(config)) == {"bfloat16"}
    assert "began (dtype.txt)" in caplog.text
    (config.folder / "dtype.txt").write_text("bf61\n")
    with pytest.raises(ValueError, match=r"dtype.txt must hold fp32 or bf16, .* got 'bf61'; write"):
        with_dtype(config, Processes())


def test_what_is_named_is_not_measured(machine, make_config):
    config = make_config({"dtype": "fp32"})
    assert with_dtype(config, Processes()) is config
    assert not machine.asked


def test_verify_measures_and_writes_nothing(machine, make_config):
    config = make_config(AUTO | {"lora": {"r": 2}})
    assert with_dtype(config, Processes(), keep=False).model.dtype == "bf16"
    assert machine.asked == [(24, "cpu", False)]
    assert not (config.folder / "dtype.txt").exists()


def test_an_adapter_has_the_size_of_its_base(machine, make_config, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    name = make_config().model.name
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=2))
    adapter.save_pretrained(tmp_path / "adapter")
    for kind in ("continue", "merge"):
        model = AUTO | {"name": str(tmp_path / "adapter"), "adapter": kind}
        with_dtype(make_config(model), Processes(), keep=False)
    assert machine.asked == [(24, "cpu", False), (24, "cpu", True)]


def dtype_of_a_machine_of_its_own(config):
    """Only the first process measures; alone, the other one would take float32."""
    processes, asked = Processes(), []

    def measure(*_, **__):
        asked.append(processes.rank)
        return ("bf16", "fp32")[processes.rank], "measured"

    weight_dtype.faster_dtype = measure
    return with_dtype(config, processes).model.dtype, asked


@pytest.mark.slow
def test_all_processes_have_the_dtype_of_the_first(make_config, tmp_path):
    found = run(2, dtype_of_a_machine_of_its_own, make_config(AUTO), folder=tmp_path)
    assert found == [("bf16", [0]), ("bf16", [])]
