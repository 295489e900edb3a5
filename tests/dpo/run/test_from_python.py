"""Runs from Python with model, tokenizer and rows in memory: as a config file would have them."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_runs import build_model, build_tokenizer

import raco_fast.dpo
from raco_fast.dpo.models import fingerprint
from raco_fast.dpo.run import result, trainer
from raco_fast.dpo.run.checkpoint import latest, read_state

WORDS = {"sure": "yes", "kind": "calm"}
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture
def asked(settings, tmp_path):
    """Keywords of a short run without model and data: two steps, one of them short."""
    kept = {k: v for k, v in settings.items() if k not in ("model", "data", "eval_data")}
    return kept | {"epochs": 1, "max_steps": 2, "output_dir": tmp_path / "from_python"}


@pytest.fixture
def rows(preference_files):
    return [json.loads(line) for line in Path(preference_files[0]).read_text().splitlines()][:24]


def loaded(tiny):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny)


def test_objects_in_memory_are_trained_as_the_same_files_are(
    tiny, rows, preference_files, asked, make_config, runs
):
    train_file, test_file = preference_files
    model, tokenizer = loaded(tiny), build_tokenizer()
    before, template = json.dumps(rows), tokenizer.chat_template
    held_out = [json.loads(line) for line in Path(test_file).read_text().splitlines()]
    run = raco_fast.dpo.train(
        {"name": model, "device": "cpu", "dropout": True},
        tokenizer,
        data=rows,
        eval_data=[{"path": held_out[:9]}, {"path": held_out[9:]}],
        **asked,
    )
    config = make_config(epochs=1, max_steps=2, data=[{"path": str(train_file), "limit": 24}])
    metrics = trainer.train(config)
    runs.assert_same_run(run, config)
    assert run.metrics == metrics
    assert run.folder == asked["output_dir"]
    assert run.model is model
    assert not model.training
    saved = loaded(run.folder / "model")
    assert fingerprint(saved) == fingerprint(model)
    assert json.dumps(rows) == before
    assert tokenizer.chat_template == template
    assert not any(module._forward_hooks for module in model.modules())
    card = (run.folder / "model" / "README.md").read_text()
    assert "# memory:LlamaForCausalLM aligned" in card
    assert "base_model" not in card


def test_a_run_goes_on_with_the_same_objects_alone(tiny, rows, asked, runs, monkeypatch):
    same = {"data": rows[:16], **asked, "max_steps": 3, "epochs": 2}
    whole = raco_fast.dpo.train(
        loaded(tiny), build_tokenizer(), **(same | {"output_dir": asked["output_dir"] / "whole"})
    )
    with monkeypatch.context() as stopped:
        runs.interrupt_after(stopped, 1)
        with pytest.raises(trainer.Interrupted):
            raco_fast.dpo.train(loaded(tiny), build_tokenizer(), **same)
    again = {"resume": True, **same}
    with pytest.raises(ValueError, match=r"was made with another model: .* its content changed"):
        raco_fast.dpo.train(whole.model, build_tokenizer(), **again)
    with pytest.raises(ValueError, match=r"was made with another data: .* its content changed"):
        raco_fast.dpo.train(loaded(tiny), build_tokenizer(), **(again | {"data": rows[15::-1]}))
    run = raco_fast.dpo.train(tiny, **again)  # by its name it is the same model
    runs.assert_equal(*(runs.weights(r) for r in (run, whole)))
    assert runs.records(run) == runs.records(whole)


def test_a_fresh_adapter_names_the_base_that_is_saved_beside_it(tiny, rows, asked):
    from peft import PeftModel

    model = loaded(tiny)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # so the folder that it was loaded from is not its base
    changed = fingerprint(model)
    run = raco_fast.dpo.train(
        {"name": model, "lora": LORA}, tiny, data={"path": rows}, **(asked | {"max_steps": 1})
    )
    adapter = json.loads((run.folder / "model" / "adapter_config.json").read_text())
    base = loaded(adapter["base_model_name_or_path"])
    assert fingerprint(base) == changed
    ids = torch.arange(1, 9)[None]
    again = PeftModel.from_pretrained(base, run.folder / "model").eval()
    assert torch.equal(again(ids).logits, run.model(ids).logits)
    assert "its base is in the folder `base`" in (run.folder / "model" / "README.md").read_text()


@pytest.mark.parametrize("reference", ["base", pytest.param("initial", marks=pytest.mark.slow)])
def test_an_adapter_in_memory_is_continued(tiny, rows, asked, save_tiny, tmp_path, reference):
    """As the same adapter on disk is: same start, same reference, same base."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(3)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=["lm_head"]
    )
    model = get_peft_model(loaded(tiny), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    asked |= {"data": rows[:8], "max_steps": 1}
    on_disk = raco_fast.dpo.train(
        {"name": folder, "reference": reference},
        tiny,
        **(asked | {"output_dir": tmp_path / "disk"}),
    )
    run = raco_fast.dpo.train({"name": model, "reference": reference}, tiny, **asked)
    states = [read_state(latest(r.folder / "checkpoints"))["run"] for r in (run, on_disk)]
    assert states[0]["model"] == states[1]["model"]
    assert len(list(Path(asked["cache_dir"]).glob("reference-*.safetensors"))) == 1
    for name, tensor in get_peft_model_state_dict(
        on_disk.model, save_embedding_layers=False
    ).items():
        assert torch.equal(tensor, get_peft_model_state_dict(run.model)[name]), name
    saved = json.loads((run.folder / "model" / "adapter_config.json").read_text())
    assert fingerprint(loaded(saved["base_model_name_or_path"])) == fingerprint(loaded(tiny))


def refused(kind, match, *given, **keywords):
    with pytest.raises(kind, match=match):
        raco_fast.dpo.train(*given, **({"weights": {"sure": 1.0}} | keywords))


def test_a_setting_that_is_none_is_named_without_what_it_was_given():
    with pytest.raises(ValueError, match=r"^`evaldata` is no setting.*did you mean 'eval_data'"):
        raco_fast.dpo.train("m", data="d", weights={}, evaldata=[{"prompt": "private"}])
    refused(ValueError, r"`lr` must be positive, got 0", "m", data="rows.jsonl", lr=0.0)
    refused(ValueError, r"`rule` must be as in a YAML file, got <obj", "m", data="d", rule=object())


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"train": ["a"]}, r"`data` must be a path, a list of rows .* got a dict"),
        ([{"prompt": "a"}, "b.jsonl"], r"`data-1` must be a path, .* got a dict"),
        ({"path": 3, "objective": "sure"}, r"`data` must be a path, .* got a int"),
    ],
)
def test_data_of_another_kind(data, match):
    refused(TypeError, match, "m", data=data)


def test_models_and_tokenizers_of_another_kind():
    model, bf16 = build_model(), build_model().to(torch.bfloat16)
    refused(TypeError, r"`model` must be a name, .* got a Linear", torch.nn.Linear(2, 2), data="d")
    refused(ValueError, r"`tokenizer` must be given with a model in memory", model, data="d")
    refused(TypeError, r"`tokenizer` must be a name, .* got a int", model, 3, data="d")
    twice = {"name": model, "tokenizer": "t"}
    refused(ValueError, r"`tokenizer` must be given once", twice, "t", data="d")
    other = {"name": bf16, "dtype": "fp32"}
    refused(ValueError, r"`model` must be in fp32, got .* torch.bfloat16", other, "t", data="d")
    half = model.to(torch.float16)
    refused(ValueError, r"`model` must be in fp32 or bf16, got .*float16", half, "t", data="d")
    refused(
        TypeError, r"`callbacks` must be objects of .*, got a type", "m", data="d", callbacks=[int]
    )


def test_models_in_memory_that_cannot_be_trained(asked, rows, tiny, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def tried(match, model, **options):
        given = {"name": model, **options}
        refused(ValueError, match, given, tiny, **{**asked, "data": rows[:2]})

    tried(
        r"`model.adapter` must be left out .* has no adapter, got 'merge'",
        loaded(tiny),
        adapter="merge",
    )
    tried(r"`model.reference` must be left out .* no adapter", loaded(tiny), reference="base")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapted = get_peft_model(loaded(tiny), config)
    tried(r"`model.lora` must be left out .* has an adapter already", adapted, lora=LORA)
    adapted.save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(loaded(tiny), tmp_path / "adapter")
    tried(r"got one that is frozen; load it by .*is_trainable=True", frozen)
    adapted.base_model.model.model.norm.weight.requires_grad_(True)
    tried(r"no trained weights outside of its adapter, got 1, the first '.*norm.weight'", adapted)
    adapted.merge_adapter()
    tried(r"got one that is merged into it; call unmerge_adapter", adapted)
    tried(r"one adapter, called 'default', got \['x'\]", get_peft_model(loaded(tiny), config, "x"))
    quantized = get_peft_model(loaded(tiny), config)
    quantized.get_base_model().hf_quantizer = "of some kind"
    tried(r"on weights that are not quantized, .* save the adapter, and name its folder", quantized)
    own = loaded(tiny)
    own.add_adapter(config)
    tried(r"must have its adapter by PEFT's", own)
    tried(r"weights on one device, got memory:Llama.* each of \['meta'\]", loaded(tiny).to("meta"))


def test_names_of_what_was_in_memory_are_refused_elsewhere(make_config):
    from raco_fast.dpo.run.inputs import load_inputs

    with pytest.raises(ValueError, match=r"`model.name` must be a folder.*stands for an object in"):
        load_inputs(make_config({"name": "memory:LlamaForCausalLM"}))
    with pytest.raises(
        ValueError, match=r"`path` must name a file, .*rows in the memory of another"
    ):
        load_inputs(make_config(data=[{"path": "memory:data"}]))


PAGE = (Path(__file__).parents[3] / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page(tiny, tmp_path, rows, asked, monkeypatch):
    example, callback = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(result, "write_report", lambda *_: None)  # a second of drawing
    exec(example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny)), names)
    assert (tmp_path / "runs" / "python" / "model" / "adapter_config.json").is_file()
    exec(callback, names)
    watch = names["Watch"]()
    kept = asked | {"eval_data": rows[:4], "data": rows[:16]}
    raco_fast.dpo.train(tiny, callbacks=[watch], **kept)
    first, *_, saved, last = watch.lines
    assert (first, saved, last) == (f"2 steps in {kept['output_dir']}", "step-00000002", "done")
    assert [line.split(":")[0] for line in watch.lines[1:-2]] == ["0", "1", "2", "2"]
