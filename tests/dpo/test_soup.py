"""A soup is the weighted mean of the updates of its adapters, in float64."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raco_fast.dpo.models import ModelOptions, trainable
from raco_fast.dpo.saved_adapters import find_adapter
from raco_fast.dpo.soup import soup

IDS = torch.arange(3, 23)[None]
KINDS = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
    },
    "pattern": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["up_proj", "v_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"v_proj": 9},
    },
}


@pytest.fixture
def base(tiny):
    return lambda: AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()


@pytest.fixture
def save(base, tmp_path):
    """A function (name, **config) -> folder of a LoRA adapter with random weights."""

    def make(name: str, dtype: torch.dtype = torch.float64, **config) -> Path:
        given = {"task_type": "CAUSAL_LM", **config}
        model = get_peft_model(base(), LoraConfig(**given), autocast_adapter_dtype=False)
        torch.manual_seed(len(name))
        for p in trainable(model).values():
            torch.nn.init.normal_(p, std=0.2)
            p.data = p.data.to(dtype)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def mean_of_updates(base, adapters) -> torch.Tensor:
    """Logits of the base plus the weighted differences that merging each adapter makes."""
    plain, summed = base(), base()
    for folder, weight in adapters.items():
        merged = PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False)
        merged = merged.merge_and_unload()
        for name, p in summed.named_parameters():
            p += weight * (merged.get_parameter(name) - plain.get_parameter(name))
    return logits(summed)


@pytest.mark.parametrize("names", [("plain", "rslora"), ("plain", "pattern"), tuple(KINDS)])
def test_the_mean_of_the_updates(base, save, tmp_path, names):
    weights = dict(zip(names, (0.3, 0.7) if len(names) == 2 else (0.2, 0.3, 0.5), strict=True))
    adapters = {save(name, **KINDS[name]): weight for name, weight in weights.items()}
    folder = soup(adapters, tmp_path / "soup")
    made = PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False)
    truth = mean_of_updates(base, adapters)
    assert (truth - logits(base())).abs().max() > 0.1
    torch.testing.assert_close(logits(made), truth, rtol=1e-12, atol=1e-12)
    found = find_adapter(ModelOptions(name=str(folder)))
    assert found.kind == "LORA"
    assert set(made.peft_config) == {"default"}
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = sum(KINDS[name]["r"] for name in names)
    (shape,) = {t.shape for k, t in tensors.items() if "layers.0.mlp.up_proj.lora_A" in k}
    assert shape[0] == expected


def test_beside_pefts_own_concatenation(base, save, tmp_path):
    adapters = {save(name, **KINDS[name]): w for name, w in (("plain", 0.25), ("rslora", 0.75))}
    theirs = PeftModel.from_pretrained(
        base(), next(iter(adapters)), "0", autocast_adapter_dtype=False
    )
    theirs.load_adapter([*adapters][1], "1", autocast_adapter_dtype=False)
    theirs.add_weighted_adapter(["0", "1"], [0.25, 0.75], "both", combination_type="cat")
    theirs.set_adapter("both")
    folder = soup(adapters, tmp_path / "soup")
    ours = PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-11, atol=1e-11)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]  # as the parts name them
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (5, 5, {})


def test_one_adapter_alone_and_of_weight_zero(base, save, tmp_path):
    one, other = save("plain", **KINDS["plain"]), save("rslora", **KINDS["rslora"])
    folder = soup({one: 1.0, other: 0.0}, tmp_path / "soup")
    made = PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False)
    alone = PeftModel.from_pretrained(base(), one, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(made), logits(alone), rtol=1e-12, atol=1e-12)
    assert made.peft_config["default"].r == 3


def test_what_is_rounded(save, tmp_path):
    """16-bit adapters become float32, whose one product is rounded once."""
    folder = save("half", dtype=torch.bfloat16, **KINDS["plain"])
    before = load_file(folder / "adapter_model.safetensors")
    after = load_file(soup({folder: 1}, tmp_path / "soup") / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for key, t in after.items():
        assert t.dtype == torch.float32
        scale = 5 / 3 if "lora_B" in key else 1.0
        assert torch.equal(t, (before[key].double() * scale).float())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which is more than LoRA's products"),
        ({"bias": "lora_only"}, "bias='lora_only', which is more"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which is more"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
    ],
)
def test_more_than_products_is_refused(save, tmp_path, config, message):
    odd = save("odd", **KINDS["plain"])
    settings = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(settings | config))
    with pytest.raises(ValueError, match=message):
        soup({odd: 1.0}, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_what_does_not_fit_is_refused(save, tmp_path):
    one, other = save("plain", **KINDS["plain"]), save("rslora", **KINDS["rslora"])
    into = tmp_path / "soup"
    with pytest.raises(ValueError, match=r"`weights` must sum to 1, got 0.9"):
        soup({one: 0.5, other: 0.4}, into)
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        soup({one: 0.5, tmp_path / "nothing": 0.5}, into)
    with pytest.raises(ValueError, match=r"`folder` must be new or empty, got .*plain"):
        soup({one: 1.0}, one)
    settings = json.loads((other / "adapter_config.json").read_text())
    text = json.dumps(settings | {"base_model_name_or_path": "another"})
    (other / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"the same base_model_name_or_path, got .* 'another'"):
        soup({one: 0.5, other: 0.5}, into)
    tensors = load_file(one / "adapter_model.safetensors")
    whole = {**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}
    save_file(whole, one / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"'base_model.model.lm_head.weight', which is no part"):
        soup({one: 1.0}, into)
    key = next(key for key in tensors if "lora_B" in key)
    save_file({k: t for k, t in tensors.items() if k != key}, one / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="an A and a B for each module"):
        soup({one: 1.0}, into)
    (one / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"`adapters`: .*plain"):
        soup({one: 1.0}, into)
    assert not into.exists()
