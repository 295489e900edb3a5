"""Every causal language model of the installed transformers, tiny.

A family's own default configuration is shrunk by rules over the names of its attributes (`RULES`)
and keeps a layer of every kind that its lists of layers name. What rules cannot know is in
`CHANGES`; families that cannot run on tokens alone are in `NOT_BUILT`, with the reason.
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
DROP = object()  # an attribute that is not handed on

NOISE = r".*(dropout|_pdrop|layerdrop|dropout_prob|jitter_noise|dropout_rate)"
# Attribute names (regular expressions for the whole name) -> value; the first that fits counts.
RULES: list[tuple[str, Any]] = [
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"(eos|sep|decoder_start|cls|eod|mask)_token_id", 2),
    (r"forced_eos_token_id|begin_suppress_tokens", None),
    (r".*_token_(id|index)", VOCAB - 1),
    (r"(.*_)?vocab_size(_.*)?", VOCAB),
    # The library's 0.02 makes layers so small that errors hide.
    (r"initializer_range|init_std|embed_init_std|initializer_factor", 0.2),
    (NOISE, 0.0),
    (r"is_decoder", True),
    (r"ignore_keys_at_rope_validation", DROP),
    (r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", 64),
    (r"model_max_length|max_target_positions", 64),
    (r"(.*_)?num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r"(.*_)?num_(.*_)?(attention_)?(key_|value_)?heads|n_heads?|.*_n_heads", 4),
    (r"(.*_)?attention_heads|num_query_groups", 4),
    (r"(qk|mamba|attention)_head_dim|mamba_(d_head|headdim)", 16),
    (r"(.*_)?(head_dim|d_head|dim_head|kv_channels|head_size)|d_kv", 8),
    (r"(mamba_)?n_groups|mamba_ngroups|o_groups", 2),
    (r"index_topk|indexer_budget", 4),
    (r"(kv|q|o)_lora_rank", 16),
    (r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|(en|de)coder_layers", 2),
    (r"hidden_size|d_model|n_embd|dim_model|emb_dim|embedding_(size|dim)|hidden_dim", 32),
    (r"router_hidden_size|(in|out)put_embedding_size|adapter_((in|out)_dim|input_size)", 32),
    (r"word_embed_proj_dim|lru_width|backbone_hidden_size|hidden_size_global", 32),
    (r"hidden_size_per_layer_input", 8),
    (r"attention_hidden_size", 64),
    (r"rotary_dim", 4),
    (r"(.*_)?intermediate_size(_.*)?|(.*_)?ffn_dim|d_ff|dff|dim_ff|d_inner|ffn_hidden_size", 48),
    (r"n_inner|feed_forward_size|expert_ffn_hidden_size", 48),
    (r"(.*_)?num_(.*_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"(num_|n_)(.*_)?shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"sliding_window(_size)?|attention_window_size|local_attention|keep_window_size", 6),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"(mamba_)?chunk_size", 4),
]
# What a default leaves to None, although no model can be built without it.
FILLED = r"(pad|bos|eos)_token_id|head_dim|n(um)?_.*(heads|experts)|num_experts_per_tok"
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
OF_THE_LIBRARY = (
    *("transformers_version", "architectures", "model_type", "id2label", "label2id"),
    *("dtype", "problem_type", "attn_implementation"),
)

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32},
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {"first_k_dense_replace": 1},
    "dots3_note_text": {
        "num_hidden_layers": 2,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "head_dim": 16,
        "per_layer_config": {
            1: {
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "head_dim": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            }
        },
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
        "intermediate_size": [48] * 4,
    },
    "got_ocr2": {"vision_config": {"output_channels": 16}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "conv", "full_attention"],
    },
    "mamba2": {"num_heads": 8},
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "num_hidden_layers": 2,
        "attn_layers": ["local", "local"],  # LSH draws other hashes in another dtype
        "attention_head_size": 8,
        "axial_pos_shape": [3, 4],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 4,
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
CHANGES["dots3_note"] = {"text_config": CHANGES["dots3_note_text"]}
CHANGES["qwen4_exp"] = {"text_config": CHANGES["qwen4_exp_text"]}

# Family -> (class of the exception, why).
NOT_BUILT: dict[str, tuple[str, str]] = {
    "gemma3n": ("ImportError", "its vision tower is of the package timm"),
    "gemma4_assistant": (
        "StrictDataclassClassValidationError",
        "drafts from another model's states, not from tokens; its default cannot be built",
    ),
    "gemma4_unified_assistant": (
        "ValueError",
        "drafts from another model's states, not from tokens; its default cannot be built",
    ),
    "musicgen": ("AttributeError", "the decoder of codebooks is given the whole configuration"),
    "musicgen_melody": (
        "AttributeError",
        "the decoder of codebooks is given the whole configuration",
    ),
}
# The same for LoRA alone.
NOT_ADAPTED: dict[str, tuple[str, str]] = {
    "reformer": (
        "RuntimeError",
        "its reversible layers give an adapter no gradient while the embedding is frozen",
    ),
}
# Layers whose weight is used without calling them: PEFT refuses these.
MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
UNCALLED = ("out_proj", "conv1d")


def causal_lms() -> list[str]:
    """All model types of transformers' AutoModelForCausalLM."""
    from transformers.models.auto import modeling_auto

    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family: str, noise: float = 0.0, **changes: Any) -> nn.Module:
    """A tiny float32 model in training mode, no parameter of it special; see `tiny`."""
    import transformers

    with quiet():
        torch.manual_seed(0)
        config = tiny(family, noise, **changes)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model.float().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1 or (p.numel() > 1 and p.min() == p.max()):
                p.add_(torch.randn_like(p), alpha=0.3)
    return model


def tiny(family: str, noise: float = 0.0, **changes: Any) -> Any:
    """A family's configuration, shrunk.

    Args:
        noise: probability of everything that is called dropout or the like.
        changes: attributes that this one has otherwise.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    small = merged(shrunk(kind()), CHANGES.get(family, {}))
    values = merged(small, changes)
    return kind(**(noisy(values, noise) if noise else values))


def noisy(values: dict[str, Any], noise: float) -> dict[str, Any]:
    """Arguments of a configuration, with every probability of noise that they name."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return noisy(value, noise)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return noise if number and re.fullmatch(NOISE, name) else value

    return {name: changed(name, value) for name, value in values.items()}


def shrunk(config: Any) -> dict[str, Any]:
    """The arguments of a small configuration like this one."""
    from transformers import PreTrainedConfig

    given = {k: v for k, v in vars(config).items() if k not in OF_THE_LIBRARY and k[0] != "_"}
    accepted = inspect.signature(type(config).__init__).parameters
    values: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = shrunk(value)
        elif isinstance(value, list | tuple | dict):
            values[name] = copy.deepcopy(value)
        elif isinstance(value, str) or (value is None and not re.fullmatch(FILLED, name)):
            if name in accepted:
                values[name] = value
        else:
            values[name] = ruled(name, value)
    if given.get("num_attention_heads") == given.get("num_key_value_heads") is not None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= a_layer_of_each_kind(given)
    return {k: v for k, v in values.items() if v is not DROP}


def ruled(name: str, value: Any) -> Any:
    """What the rules make of an attribute, in the type of its default."""
    for pattern, small in RULES:
        if re.fullmatch(pattern, name) and not (isinstance(value, bool) and small is not True):
            plain = small is None or small is DROP or value is None
            return small if plain else type(value)(small)
    return value


def a_layer_of_each_kind(given: Mapping[str, Any]) -> dict[str, Any]:
    """The lists with one entry for each layer, and the depth, cut to layers that differ."""
    depths = [name for name in DEPTHS if name in given]
    depth = given[depths[0]] if depths else None
    lists = {
        name: list(value)
        for name, value in given.items()
        if isinstance(value, list | tuple)
        and len(value) == depth
        and len(value) > 2
        and not isinstance(value[0], list | dict)
    }
    if not lists:
        return {}
    numbering = list(range(len(next(iter(lists.values())))))
    seen: set[tuple[str, Any]] = set()
    kept = []
    for i in numbering:
        kinds = {(name, value[i]) for name, value in lists.items() if value != numbering}
        if kinds - seen:
            kept.append(i)
            seen |= kinds
    kept = sorted({*kept, *[i for i in numbering if i not in kept][: max(0, 2 - len(kept))]})
    cut = {
        name: list(range(len(kept))) if value == numbering else [value[i] for i in kept]
        for name, value in lists.items()
    }
    return cut | dict.fromkeys(depths, len(kept))


def merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with changes, which reach into nested configurations."""
    both = dict(values)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = merged(both[name], value) if nested else value
    return both


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers has to say about odd sizes."""
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
    """Right-padded rows of unequal length with unequal prompts; no special tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB - 1, (rows, longest), generator=generator)
    length = torch.randint(5, longest + 1, (rows, 1), generator=generator)
    length[1] = longest
    place = torch.arange(longest)
    mask = place < length
    scored = mask & (place >= torch.randint(1, 4, (rows, 1), generator=generator))
    return SimpleNamespace(ids=ids.masked_fill(~mask, 0), mask=mask, scored=scored)


def base(model: nn.Module) -> Any:
    """The family's own model, also of one with LoRA."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits_of(model: nn.Module, batch: SimpleNamespace) -> Tensor:
    """[B, T, V]; what a family's forward does not take is not given."""
    given = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}
    taken = inspect.signature(type(base(model)).forward).parameters
    return model(**{k: v for k, v in given.items() if k in taken}).logits


def adapted(model: nn.Module) -> nn.Module:
    """With LoRA on every linear layer but the head, B not zero."""
    import peft
    from transformers.pytorch_utils import Conv1D

    refused = UNCALLED if model.config.model_type in MAMBAS else ()
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
        # Not what computes something else: routers return tuples, grouped layers other shapes.
        and (
            type(m) in (nn.Linear, Conv1D) or re.fullmatch("(?!.*Group).*Linear", type(m).__name__)
        )
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
