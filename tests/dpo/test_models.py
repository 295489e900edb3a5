import json
import shutil

import pytest
import torch
from gguf_files import write_gguf

from raco_fast.dpo import loading, models
from raco_fast.dpo.models import LoraOptions, ModelOptions, fingerprint, pick_device, trainable
from raco_fast.dpo.policy import add_adapter, load_base_model, load_tokenizer


def load(folder, **options):
    return load_base_model(ModelOptions(str(folder), device="cpu", **options))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_folder_is_loaded_at_the_dtype_asked_for(tiny, dtype):
    model = load(tiny, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {models.DTYPES[dtype]}
    assert trainable(model).keys() == dict(model.named_parameters()).keys()
    tokenizer = load_tokenizer(ModelOptions(str(tiny)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_gradient_checkpointing_is_switched_on(tiny):
    assert all(
        layer.gradient_checkpointing
        for layer in load(tiny, gradient_checkpointing=True).get_decoder().layers
    )
    assert not any(layer.gradient_checkpointing for layer in load(tiny).get_decoder().layers)


def test_an_adapter_trains_its_own_weights_only(tiny):
    base = load(tiny)
    assert add_adapter(base, None) is base
    policy = add_adapter(base, LoraOptions(r=3, alpha=9, dropout=0.25))
    assert trainable(policy)
    assert all("lora_" in name for name in trainable(policy))
    layer = policy.get_base_model().model.layers[0].mlp.down_proj
    assert (layer.r["default"], layer.scaling["default"]) == (3, 3.0)
    assert layer.lora_dropout["default"].p == 0.25
    narrow = add_adapter(load(tiny), LoraOptions(r=2, target_modules=["q_proj"]))
    assert len(trainable(narrow)) == 4


def test_a_fingerprint_sees_every_weight_and_what_the_configuration_computes(tiny, tmp_path):
    first = fingerprint(load(tiny))
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny, moved)
    assert fingerprint(load(moved)) == first
    assert fingerprint(load(tiny, dtype="bf16")) != first
    model = load(tiny)
    for place in (0, 17, -1):
        changed = model.state_dict()["model.layers.1.mlp.up_proj.weight"].view(-1)
        before = float(changed[place])
        changed[place] = before * 1.000001 + 1e-7
        assert fingerprint(model) != first
        changed[place] = before
    assert fingerprint(model) == first
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert fingerprint(load(moved)) != first


def test_a_gguf_file_becomes_dense_trainable_weights(tiny, tmp_path):
    pytest.importorskip("gguf")
    original = load(tiny)
    model = load(write_gguf(original, tmp_path / "tiny.gguf"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(trainable(model)) == len(trainable(original))
    model(ids).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)


def test_a_missing_gguf_package_is_one_clear_message(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "gguf" else 1 / 0)
    with pytest.raises(
        ValueError, match=r"needs the package gguf; pip install 'raco-fast\[gguf\]'"
    ):
        load(file)


@pytest.mark.parametrize(
    "name",
    ["./nowhere", "/no/such/model", "~/no-such-model", "a/b/c", "x" * 300],
)
def test_a_path_that_is_not_there(name):
    with pytest.raises(ValueError, match=r"`model.name` must be a folder") as error:
        load(name)
    assert name in str(error.value)


def test_models_that_cannot_be_read(tmp_path, tiny):
    with pytest.raises(
        ValueError, match=r"`model.name`: no GGUF file at '.*lost.gguf'; check the path"
    ):
        load(tmp_path / "lost.gguf")
    with pytest.raises(ValueError, match=r"`model.name`: 'nobody/such-a-model' cannot be loaded"):
        load("nobody/such-a-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`model.name`: .*empty.* cannot be loaded"):
        load(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"`model.name`: '.*broken' cannot be loaded: "):
        load(broken)


def test_options_out_of_range():
    with pytest.raises(
        ValueError, match=r"`dtype` must be one of \['auto', 'bf16', 'fp32'\], got 'fp16'"
    ):
        ModelOptions("x", dtype="fp16")
    for device in ("tpu-of-my-own", "cuda:77"):
        with pytest.raises(ValueError, match=f"`device` must be 'auto', .* got '{device}'"):
            ModelOptions("x", device=device)
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
