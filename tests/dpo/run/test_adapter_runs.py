"""Runs that begin with an adapter or a GGUF file: resumed, and loaded by transformers and PEFT."""

import json
import math
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from quick_cases import matrix
from transformers import AutoModelForCausalLM

from raco_fast.dpo.models import trainable
from raco_fast.dpo.run.trainer import Trainer, train
from raco_fast.dpo.run.verification import verify_run

IDS = torch.arange(3, 23)[None]
FRESH = {"r": 4, "alpha": 8, "dropout": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "continue": {},
    "from the base": {"reference": "base"},
    "merge and tune": {"adapter": "merge"},
    "merge and adapt": {"adapter": "merge", "lora": FRESH},
    "reference": {"adapter": "reference", "lora": FRESH},
}


@pytest.fixture
def adapter(tiny, tmp_path):
    """A LoRA adapter on the tiny model, as PEFT alone leaves it."""
    config = LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "up_proj"], use_rslora=True
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    torch.manual_seed(5)
    for p in trainable(model).values():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def start(make_config, tiny, adapter):
    """A function that makes the config of a way of using the adapter."""
    own = {"name": str(adapter), "tokenizer": str(tiny)}
    return lambda way, **changes: make_config(own | WAYS[way], max_steps=4, **changes)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def assert_loads_as_trained(folder, trained, *, adapter):
    """The saved folder alone, and what it names, is the trained policy."""
    truth = logits(trained)
    loaded = [AutoModelForCausalLM.from_pretrained(folder)]
    if adapter:
        loaded.append(AutoPeftModelForCausalLM.from_pretrained(folder))
    for model in loaded:
        torch.testing.assert_close(logits(model), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", matrix(list(WAYS), quick=[("continue",), ("merge and adapt",)]))
def test_the_saved_folder_is_the_trained_policy(runs, start, tiny, adapter, monkeypatch, way):
    monkeypatch.chdir(adapter.parent)
    config = start(way, output_dir="run")  # a relative path, which a saved adapter may not keep
    runner = Trainer(config)
    begun = logits(runner.model)
    runner.run()
    saved = config.folder.absolute() / "model"
    monkeypatch.chdir("/")
    assert (logits(runner.model) - begun).abs().max() > 0.02
    assert_loads_as_trained(saved, runner.model, adapter=way != "merge and tune")
    assert (saved.parent / "base").exists() == (way == "merge and adapt")
    assert {f.name for f in saved.iterdir()} >= {"README.md", "tokenizer_config.json"}
    assert not (saved / "reference").exists()
    card = (saved / "README.md").read_text()
    assert f"adapter on `{tiny}`" in card
    assert ("library_name: transformers" in card) == (way == "merge and tune")


@pytest.mark.parametrize("way", matrix(list(WAYS), quick=[("reference",)]))
def test_the_first_loss_is_that_of_the_reference_asked_for(runs, start, tiny, adapter, way):
    """ln 2 where the policy is the reference, else what PEFT's two models give."""
    config = start(way, eval_every=None)
    train(config)
    first = runs.evaluations(config)[0]
    if way in ("from the base", "reference"):
        assert abs(first["eval_loss/sure"] - math.log(2)) > 1e-3
        base = AutoModelForCausalLM.from_pretrained(tiny)
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter)
        policy, reference = (base, tuned) if way == "reference" else (tuned, base)
        assert first["eval_loss/sure"] == pytest.approx(
            loss_by_hand(Trainer(start(way, output_dir=config.output_dir + "-")), policy, reference)
        )
    else:
        assert first["eval_loss/sure"] == pytest.approx(math.log(2), rel=1e-6)
        assert first["eval_rewards/margins/sure"] == 0


def loss_by_hand(runner, policy, reference) -> float:
    """The mean DPO loss of `sure` over the held-out pairs, with transformers' own logits."""
    losses = []
    for pair in runner.inputs.held_out:
        if not pair.labels["sure"]:
            continue
        rewards = []
        for response in (pair.a_ids, pair.b_ids):
            ids, sums = torch.tensor([pair.prompt_ids + response]), []
            for model in (policy, reference):
                with torch.no_grad():
                    each = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
                taken = each.gather(-1, ids[0, 1:, None])[len(pair.prompt_ids) - 1 :]
                sums.append(float(taken.sum()))
            rewards.append(0.1 * (sums[0] - sums[1]))
        margin = pair.labels["sure"] * (rewards[0] - rewards[1])
        losses.append(math.log1p(math.exp(-margin)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("way", matrix(list(WAYS), quick=[("reference",)]))
def test_an_interrupted_run_goes_on_bit_for_bit(runs, start, monkeypatch, way):
    from raco_fast.dpo.run.trainer import Interrupted

    whole, cut = start(way), start(way, output_dir=start(way).output_dir + "-cut")
    train(whole)
    runs.interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(cut)
    monkeypatch.undo()
    train(cut, resume=True)
    runs.assert_same_run(whole, cut)


def test_a_resume_refuses_an_adapter_that_changed(runs, start, monkeypatch, adapter):
    from raco_fast.dpo.run.trainer import Interrupted

    config = start("continue")
    runs.interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(config)
    saved = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(saved | {"lora_alpha": 7}))
    with pytest.raises(ValueError, match="was made with another model"):
        train(config, resume=True)


@pytest.mark.parametrize("way", ["merge and adapt", "reference"])
def test_verify_takes_an_adapter_and_writes_nothing(start, way):
    config = start(way)
    assert not verify_run(config).wrong
    assert not config.folder.exists()


def test_a_base_is_written_once(start, runs, monkeypatch):
    from raco_fast.dpo.run.trainer import Interrupted

    config = start("merge and adapt")
    runs.interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(config)
    file = config.folder / "base" / "model.safetensors"
    before = file.stat()
    monkeypatch.undo()
    train(config, resume=True)
    assert file.stat().st_ino == before.st_ino
    for written in (config.folder / "base").iterdir():
        written.unlink()
    Trainer(start("merge and adapt"), resume=True)
    assert file.is_file()


@pytest.mark.parametrize(
    "lora", [pytest.param(None, marks=pytest.mark.slow), FRESH], ids=["full", "lora"]
)
def test_a_model_from_a_gguf_file_is_saved_so_that_it_loads(make_config, tiny, tmp_path, lora):
    pytest.importorskip("gguf")
    file = write_gguf(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "tiny.gguf")
    model = {"name": str(file), "tokenizer": str(tiny), "lora": lora}
    runner = Trainer(make_config(model, max_steps=3, eval_data=[]))
    runner.run()
    saved = runner.config.folder / "model"
    assert_loads_as_trained(saved, runner.model, adapter=lora is not None)
    if lora is not None:
        assert (
            "its base is in the folder `base` beside this one" in (saved / "README.md").read_text()
        )
        again = make_config(
            {"name": str(saved)}, max_steps=1, output_dir=str(tmp_path / "again"), eval_data=[]
        )
        continued = Trainer(again)
        assert torch.equal(logits(continued.model), logits(runner.model))
        assert continued.model.peft_config["default"].base_model_name_or_path == str(
            saved.parent / "base"
        )


def test_a_padding_token_beyond_the_model_does_no_harm(runs, make_config, tiny, tmp_path, caplog):
    """As in chat models whose `[PAD]` came after the embedding was made."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    known = AutoModelForCausalLM.from_pretrained(tiny).config.vocab_size
    tokenizer.add_tokens([f"<{k}>" for k in range(known - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert tokenizer.pad_token_id == known
    own = {"tokenizer": str(tmp_path / "tokenizer"), "dropout": False}
    both = [
        make_config(model, max_steps=2, output_dir=str(tmp_path / name))
        for name, model in (("own", own), ("plain", {"dropout": False}))
    ]
    for config in both:
        train(config)
    assert f"`model.tokenizer` has {known + 1} tokens and the model knows {known}" in caplog.text
    runs.assert_equal(*(runs.weights(config) for config in both))
