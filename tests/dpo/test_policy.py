"""What a policy starts from, and its reference, where `model.name` is an adapter of PEFT's."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raco_fast.dpo.models import LoraOptions, ModelOptions, trainable
from raco_fast.dpo.policy import load_base_model, load_tokenizer, make_policy

IDS = torch.arange(3, 25)[None]
LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
FRESH = {"r": 4}
KINDS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(use_dora=True, **LORA),
    "rslora": LoraConfig(use_rslora=True, **LORA),
    "ranks": LoraConfig(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 7}, **LORA),
    "head": LoraConfig(modules_to_save=["lm_head"], **LORA),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def save_adapter(base, folder, config, scale=0.3):
    """An adapter as a run of PEFT alone leaves it, every weight moved off its first value."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), deepcopy(config))
    torch.manual_seed(11)
    for p in trainable(model).values():
        with torch.no_grad():
            p.add_(scale * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tiny, tmp_path):
    """A function that saves an adapter of a kind on the tiny model, and returns its folder."""
    return lambda kind="lora", base=tiny, name="adapter": save_adapter(
        base, tmp_path / name, KINDS[kind]
    )


def policy(name, keep_base=None, lora=None, **options):
    lora = None if lora is None else LoraOptions(**lora)
    options = ModelOptions(str(name), device="cpu", lora=lora, **options)
    return make_policy(load_base_model(options), options, keep_base)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def logits_by_peft(base, folder):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def reference_logits(ours):
    with ours.as_reference(ours.model):
        return logits(ours.model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_adapter_starts_and_is_compared_where_it_stood(adapter, tiny, kind):
    folder = adapter(kind, base := tiny)
    ours, truth = policy(folder), logits_by_peft(base, folder)
    assert torch.equal(logits(ours.model), truth)
    assert torch.equal(reference_logits(ours), truth)
    assert (truth - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.05
    assert ours.starts_at_reference
    stored = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True
    )
    assert trainable(ours.model).keys() == trainable(stored).keys() != set()


@pytest.mark.parametrize("kind", ["lora", "dora", "head", "ia3"])
def test_the_reference_of_a_continued_adapter_may_be_its_base(adapter, tiny, kind):
    ours = policy(adapter(kind), reference="base")
    base = logits(AutoModelForCausalLM.from_pretrained(tiny))
    assert torch.equal(reference_logits(ours), base)
    assert not torch.equal(logits(ours.model), base)
    assert not ours.starts_at_reference
    assert ours.reference_hash == policy(tiny).reference_hash


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("lora", None), ("dora", None), ("rslora", None), ("head", FRESH), ("ia3", FRESH)],
)
def test_a_merged_adapter_is_below_what_is_trained(adapter, tiny, kind, lora):
    folder = adapter(kind)
    ours = policy(folder, adapter="merge", lora=lora)
    truth = logits_by_peft(tiny, folder)
    for found in (logits(ours.model), reference_logits(ours)):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    assert ours.starts_at_reference
    names = trainable(ours.model)
    if lora is None:
        assert names.keys() == dict(ours.model.named_parameters()).keys()
        assert names.keys() == trainable(AutoModelForCausalLM.from_pretrained(tiny)).keys()
    else:
        assert all("lora_" in name for name in names)
        assert {p.shape[0] for name, p in names.items() if "lora_A" in name} == {4}


def test_an_adapter_may_be_the_reference_of_a_fresh_one(adapter, tiny):
    folder = adapter()
    ours = policy(folder, adapter="reference", lora={"r": 4, "target_modules": ["v_proj"]})
    base = logits(AutoModelForCausalLM.from_pretrained(tiny))
    for _ in range(2):
        assert torch.equal(logits(ours.model), base)
        assert torch.equal(reference_logits(ours), logits_by_peft(tiny, folder))
        assert all("v_proj.lora_" in name and "default" in name for name in trainable(ours.model))
        assert len(trainable(ours.model)) == 4
    assert not ours.starts_at_reference
    assert ours.model_hash == policy(tiny).model_hash
    assert ours.reference_hash == policy(folder).reference_hash


def test_hashes_see_the_weights_and_the_scale_of_an_adapter(adapter, tiny, tmp_path):
    folder, moved = adapter(), tmp_path / "moved"
    shutil.copytree(folder, moved)
    first = policy(folder).model_hash
    assert policy(moved).model_hash == first == policy(folder).reference_hash
    assert first != policy(tiny).model_hash
    saved = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(saved | {"lora_alpha": 6}))
    assert policy(moved).model_hash != first
    other = save_adapter(tiny, tmp_path / "other", KINDS["lora"], scale=0.31)
    assert policy(other).model_hash != first


def test_lora_options_of_a_continued_adapter_agree_with_it_or_are_refused(adapter, tiny, tmp_path):
    folder = adapter()
    same = {"r": 3, "alpha": 5, "target_modules": ["down_proj", "q_proj"]}
    assert policy(folder, lora=same).model_hash == policy(folder).model_hash
    with pytest.raises(
        ValueError,
        match=r"`model.lora` has r 16, the adapter has 3; alpha 32, the adapter has 5; "
        r"target_modules 'all-linear', the adapter has .*down_proj.*; leave `model.lora` out",
    ):
        policy(folder, lora={})
    with pytest.raises(ValueError, match=r"modules_to_save \['lm_head'\], the adapter has \[\]"):
        policy(folder, lora=same | {"modules_to_save": ["lm_head"]})
    with pytest.raises(ValueError, match=r"dropout 0.5, the adapter has 0.0"):
        policy(folder, lora=same | {"dropout": 0.5})
    with pytest.raises(ValueError, match=r"`model.lora`: the adapter .* is of kind IA3; leave"):
        policy(adapter("ia3", name="ia3"), lora=same)
    every = save_adapter(tiny, tmp_path / "all", LoraConfig(r=2, target_modules="all-linear"))
    assert policy(every, lora={"r": 2, "alpha": 8}).starts_at_reference


def test_the_base_is_named_by_the_adapter_or_by_the_config(adapter, tiny, tmp_path, save_tiny):
    folder, elsewhere = adapter(), tmp_path / "elsewhere"
    shutil.copytree(tiny, elsewhere)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert policy(folder).model.peft_config["default"].base_model_name_or_path == str(tiny)
    for base, message in (
        (None, r"does not say what it was trained on .*is None.*`model.base`"),
        ("/no/such/base", r"the base of the adapter .*adapter' is not here .*/no/such/base"),
    ):
        changed = saved | {"base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            policy(folder)
    ours = policy(folder, base=str(elsewhere))
    assert torch.equal(logits(ours.model), logits_by_peft(tiny, folder))
    assert ours.model.peft_config["default"].base_model_name_or_path == str(elsewhere)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*size mismatch.*`model.base`"):
        policy(folder, base=str(save_tiny(hidden_size=32)))
    with pytest.raises(ValueError, match=r"the adapter .* has too much 4 weights for its base"):
        policy(folder, base=str(save_tiny(num_hidden_layers=1)))
    with pytest.raises(ValueError, match=r"the adapter .* lacks 4 weights for its base"):
        policy(folder, base=str(save_tiny(num_hidden_layers=3)))
    with pytest.raises(ValueError, match=r"the base '.*adapter' of the adapter .* is an adapter"):
        policy(adapter(name="second"), base=str(adapter()))


def test_a_head_that_was_trained_whole_may_not_be_missing(adapter):
    from safetensors.torch import load_file, save_file

    file = adapter("head") / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "lm_head" not in k}, file)
    with pytest.raises(ValueError, match=r"'.*adapter' cannot be loaded: KeyError: .*lm_head"):
        policy(file.parent)
    file.unlink()
    with pytest.raises(
        ValueError, match=r"'.*adapter' has no adapter_model.safetensors or adapter"
    ):
        policy(file.parent)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True")
def test_what_merging_cannot_do_exactly_is_refused(adapter, save_tiny, tmp_path):
    tied = save_tiny(tie_word_embeddings=True)
    folder = adapter("head", base=tied)
    with pytest.raises(ValueError, match=r"the embedding or the head, which are one weight in its"):
        policy(folder, adapter="merge")
    assert torch.equal(logits(policy(folder).model), logits_by_peft(tied, folder))
    huge = save_adapter(tied, tmp_path / "huge", KINDS["lora"], scale=1e25)
    with pytest.raises(ValueError, match=r"`model.name`: '.*huge' cannot be loaded: NaNs detected"):
        policy(huge, adapter="merge")


@pytest.mark.filterwarnings("ignore:.*disabling adapter layers with bias")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_adapters_that_are_not_for_this(adapter, tiny, tmp_path):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    folder = save_adapter(tiny, tmp_path / "prompts", prompts)
    with pytest.raises(
        ValueError, match=r"kind PROMPT_TUNING adds tokens to the prompt.*got '.*pr"
    ):
        policy(folder)
    folder = adapter()
    file = folder / "adapter_config.json"
    saved = file.read_text()
    file.write_text(json.dumps(json.loads(saved) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(ValueError, match=r"'.*adapter' was trained for SEQ_CLS, where a causal LM"):
        policy(folder)
    file.write_text(saved)
    with pytest.raises(ValueError, match=r"`model.adapter: reference` needs a LoRA adapter.*IA3"):
        policy(adapter("ia3", name="ia3"), adapter="reference", lora={"r": 2})
    biases = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")
    biased = save_adapter(save_gpt2(tmp_path / "gpt2"), tmp_path / "biased", biases)
    for options in ({"reference": "base"}, {"adapter": "reference", "lora": {"r": 2}}):
        with pytest.raises(ValueError, match=r"'.*biased' changes weights of its base itself"):
            policy(biased, **options)
    shutil.copy(tiny / "config.json", folder)
    with pytest.raises(ValueError, match=r"'.*adapter' holds a model .* and an adapter .*move one"):
        policy(folder)


def save_gpt2(folder):
    """A tiny GPT-2, whose layers have biases that an adapter may train in place."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_options_of_an_adapter_need_one(tiny):
    for options in ({"adapter": "merge"}, {"reference": "base"}, {"base": str(tiny)}):
        (key,) = options
        with pytest.raises(
            ValueError, match=rf"`model.{key}`: .* is for a `model.name` that is an"
        ):
            policy(tiny, **options)
    with pytest.raises(
        ValueError, match=r"`model.reference: base` is for `model.adapter: continue`"
    ):
        ModelOptions("x", device="cpu", adapter="merge", reference="base")
    with pytest.raises(ValueError, match=r"`model.adapter: reference` needs `model.lora`"):
        ModelOptions("x", device="cpu", adapter="reference")
    with pytest.raises(ValueError, match=r"`adapter` must be one of \['continue', 'merge', 'ref"):
        ModelOptions("x", device="cpu", adapter="drop")


def test_the_tokenizer_is_the_adapters_or_its_bases(adapter, tiny, save_tiny):
    folder = adapter()
    assert len(load_tokenizer(ModelOptions(str(folder), device="cpu"))) > 10
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny)
    own.add_tokens(["extra"])
    own.save_pretrained(folder)
    assert len(load_tokenizer(ModelOptions(str(folder), device="cpu"))) == len(own)
