import json
import shutil

import pytest
import torch

from raco_fast.dpo import models
from raco_fast.dpo.models import (
    LoraOptions,
    ModelOptions,
    add_adapter,
    fingerprint,
    load_base_model,
    load_tokenizer,
    pick_device,
    trainable,
)


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
    gguf = pytest.importorskip("gguf")
    file = write_gguf(gguf, tiny, tmp_path / "tiny.gguf")
    model, original = load(file), load(tiny)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(trainable(model)) == len(trainable(original))
    model(ids).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)


def write_gguf(gguf, folder, file):
    """The tiny Llama as llama.cpp writes one: its names, its row order of q and k."""
    model = load(folder)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for k in range(config.num_hidden_layers):
        names |= {f"model.layers.{k}.{a}": f"blk.{k}.{b}" for a, b in parts.items()}
    for name, tensor in model.state_dict().items():
        weight = tensor
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads
            weight = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_missing_gguf_package_is_one_clear_message(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "gguf" else 1 / 0)
    with pytest.raises(
        ValueError, match=r"needs the package gguf; pip install 'raco-fast\[gguf\]'"
    ):
        load(file)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "~/no-such-model", "a/b/c"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(ValueError, match="`model` must be a folder with a saved model") as error:
        load(name)
    assert name in str(error.value)


def test_models_that_cannot_be_read(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"`model`: no GGUF file at '.*lost.gguf'; check the path"):
        load(tmp_path / "lost.gguf")
    with pytest.raises(ValueError, match=r"`model`: 'nobody/such-a-model' cannot be loaded"):
        load("nobody/such-a-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot be loaded|nrecognized model"):
        load(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"`model`: '.*broken' cannot be loaded: "):
        load(broken)


def test_options_out_of_range():
    with pytest.raises(ValueError, match=r"`dtype` must be one of \['bf16', 'fp32'\], got 'fp16'"):
        ModelOptions("x", dtype="fp16")
    for device in ("tpu-of-my-own", "cuda:77"):
        with pytest.raises(ValueError, match=f"`device` must be 'auto', .* got '{device}'"):
            ModelOptions("x", device=device)
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
