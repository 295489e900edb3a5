"""Every causal language model of the installed transformers, tiny.

A family's own default configuration is shrunk by rules over its attributes' names (`RULES`), and
keeps one layer of every kind that its lists of layers name. What the rules cannot know is in
`CHANGES`; families that cannot be built or run on tokens alone are in `NOT_BUILT`, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 61
MAMBAS = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "conv1d")
)  # layers whose weight is used without calling them: PEFT refuses these
DROP = object()  # a value that is not handed on
# Attribute names (regular expressions, whole words of the name in full) -> value; the first counts.
RULES: list[tuple[str, Any]] = [
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"(eos|sep|decoder_start|cls|eod|mask)_token_id", 2),
    (r"forced_eos_token_id|begin_suppress_tokens", None),
    (r".*_token_(id|index)", VOCAB - 1),
    (r"(.*_)?vocab_size(_.*)?", VOCAB),
    (r"initializer_range|init_std|embed_init_std|initializer_factor", 0.2),
    (r".*(dropout|_pdrop|layerdrop|dropout_prob|jitter_noise|dropout_rate)", 0.0),
    (r"is_decoder", True),
    (r"ignore_keys_at_rope_validation", DROP),
    (r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", 64),
    (r"model_max_length|max_target_positions|max_sequence_length", 64),
    (r"(.*_)?num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r"(.*_)?num_(.*_)?(attention_)?(key_|value_)?heads|n_heads?|.*_n_heads", 4),
    (r"(.*_)?attention_heads|num_query_groups", 4),
    (r"(qk|mamba|attention)_head_dim|mamba_(d_head|headdim)", 16),
    (r"(.*_)?(head_dim|d_head|dim_head|kv_channels|head_size)|d_kv", 8),
    (r"(mamba_)?n_groups|mamba_ngroups|o_groups", 2),
    (r"index_topk|indexer_budget", 4),
    (r"(kv|q|o)_lora_rank", 16),
    (r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|(en|de)coder_layers)", 2),
    (r"hidden_size|d_model|n_embd|dim_model|emb_dim|embedding_(size|dim)|hidden_dim", 32),
    (r"router_hidden_size|(in|out)put_embedding_size|rotary_dim_full", 32),
    (r"rotary_dim", 4),
    (r"attention_hidden_size", 64),
    (r"word_embed_proj_dim|lru_width|backbone_hidden_size|hidden_size_global", 32),
    (r"(.*_)?intermediate_size(_.*)?|(.*_)?ffn_dim|d_ff|dff|dim_ff|d_inner|ffn_hidden_size", 48),
    (r"n_inner|feed_forward_size|mlp_dim|expert_ffn_hidden_size", 48),
    (r"(.*_)?num_(.*_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts)", 2),
    (r"(num_|n_)(.*_)?shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"sliding_window(_size)?|attention_window_size|local_attention|keep_window_size", 6),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"(mamba_)?chunk_size", 4),
]
KEPT = {"sliding_window": None}  # where the default has none, ours has none


def causal_lms() -> list[str]:
    """All model types of transformers' AutoModelForCausalLM."""
    from transformers.models.auto import modeling_auto

    return list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


CHANGES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in ("sliding_attention", "full_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
    "got_ocr2": {"vision_config": {"output_channels": 16}},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 16, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32}},
    "dots3_note_text": {"layer_types": ["indexed_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2, "head_dim": 16, "per_layer_config": {1: {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 8}}},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.5, 0.0] * 2, "intermediate_size": [48] * 4, "hidden_size_per_layer_input": 8},
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention"]},
    "longcat_flash": {"qk_rope_head_dim": 8, "head_dim": 8},
    "mamba2": {"num_heads": 8},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24], "attn_layers": ["local", "lsh"], "num_hidden_layers": 2, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "hash_seed": 0, "num_buckets": 4, "attention_head_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4, "hybrid_layer_ids": [1, 3]},
    "hrm_text": {"num_layers_per_stack": 2},
}
CHANGES["dots3_note"] = {"text_config": CHANGES["dots3_note_text"], "audio_config": {"adapter_in_dim": 32}}
CHANGES["qwen4_exp"] = {"text_config": CHANGES["qwen4_exp_text"]}
NOT_BUILT: dict[str, str] = {}


def tiny(name: str) -> Any:
    """A family's configuration, shrunk."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    try:
        default = kind()
    except Exception:
        default = kind(**CHANGES.get(name, {}))
    values = shrunk(default)
    merge(values, CHANGES.get(name, {}))
    return kind(**values)


def merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


DROPPED = {
    "transformers_version", "architectures", "model_type", "id2label", "label2id", "_name_or_path",
    "dtype", "torch_dtype", "problem_type", "attn_implementation", "_attn_implementation",
}  # fmt: skip


def shrunk(config: Any) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    fields = {k: v for k, v in vars(config).items() if k not in DROPPED and not k.startswith("_")}
    accepted = inspect.signature(type(config).__init__).parameters
    values: dict[str, Any] = {}
    layers = sampled_layers(fields)
    for key, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            values[key] = shrunk(value)
        elif key in layers:
            values[key] = layers[key]
        elif value is None:
            if re.fullmatch("(pad|bos|eos)_token_id|head_dim|n(um)?_.*(heads|experts)|num_experts_per_tok", key):
                values[key] = ruled(key, value)
            elif key in accepted:
                values[key] = value
        elif isinstance(value, str):
            if key in accepted:
                values[key] = value
        else:
            values[key] = ruled(key, value)
    heads, kv = (fields.get(k) for k in ("num_attention_heads", "num_key_value_heads"))
    if heads and heads == kv:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return {k: v for k, v in values.items() if v is not DROP}


def ruled(key: str, value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return copy.deepcopy(value)
    for pattern, small in RULES:
        if re.fullmatch(pattern, key):
            if isinstance(value, bool) and not isinstance(small, bool):
                return value
            return type(value)(small) if isinstance(value, int | float) and small not in (None, DROP) else small
    return value


def sampled_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, and their number, cut to one layer of each kind."""
    depth = next(
        (fields[k] for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if k in fields),
        None,
    )
    lists = {
        k: v
        for k, v in fields.items()
        if isinstance(v, (list, tuple)) and depth and len(v) == depth and depth > 2
        and not isinstance(v[0], (list, dict))
    }
    if not lists or depth is None:
        return {}
    kept: list[int] = []
    seen: set[tuple[str, Any]] = set()
    for i in range(depth):
        new = {(k, v[i]) for k, v in lists.items() if not is_index(v)} - seen
        if new:
            kept.append(i)
            seen |= new
    for i in range(depth):
        if len(kept) < 2 and i not in kept:
            kept.append(i)
    kept.sort()
    found: dict[str, Any] = {
        k: list(range(len(kept))) if is_index(v) else [v[i] for i in kept] for k, v in lists.items()
    }
    for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if k in fields:
            found[k] = len(kept)
    return found


def is_index(values: Any) -> bool:
    return list(values) == list(range(len(values)))


def build(name: str) -> nn.Module:
    """A tiny float32 model of a family whose parameters are nothing special; no dropout."""
    import transformers

    with quiet():
        torch.manual_seed(0)
        config = tiny(name)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model.float().train()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1 or p.numel() > 1 and p.min() == p.max():
                    p.add_(torch.randn_like(p), alpha=0.3)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says about odd sizes."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def batch_of(rows: int = 4, longest: int = 12) -> SimpleNamespace:
    """Right-padded rows of unequal length with unequal prompts."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB - 6, (rows, longest), generator=generator)
    length = torch.randint(5, longest + 1, (rows, 1), generator=generator)
    length[1] = longest
    place = torch.arange(longest)
    mask = place < length
    scored = mask & (place >= torch.randint(1, 4, (rows, 1), generator=generator))
    return SimpleNamespace(ids=ids.masked_fill(~mask, 0), mask=mask, scored=scored)


def forward(model: nn.Module, batch: SimpleNamespace) -> Tensor:
    """Logits of a batch; what a family's forward does not take is left out."""
    given = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}
    taken = inspect.signature(type(base(model)).forward).parameters
    out = model(**{k: v for k, v in given.items() if k in taken})
    return out.logits


def base(model: nn.Module) -> Any:
    """The family's own model, also of one with LoRA."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapted(model: nn.Module) -> nn.Module:
    """With LoRA on every linear layer but the head, B not zero."""
    import peft
    from transformers.pytorch_utils import Conv1D

    refused = MAMBAS.get(model.config.model_type, ())
    layers = {
        name: m
        for name, m in model.named_modules()
        if type(m) in (nn.Linear, Conv1D)
        and m is not model.get_output_embeddings()
        and name.split(".")[-1] not in refused
    }
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in layers.values()),
    )
    with quiet():
        model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return model
