"""Loading a whole causal LM and its tokenizer: from the hub, a folder or a GGUF file.

Nothing is loaded that would train in silence as something else than its name says: weights that are
missing would be random, an encoder sees the tokens it is to predict, and quantized weights have no
gradient.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raco_fast.dpo.load_errors import LoadErrors
from raco_fast.dpo.models import DTYPES, ModelOptions, enable_checkpointing
from raco_fast.settings.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CURE = "use a complete copy of it, as `save_pretrained` or a download writes it"
_NOT_LANGUAGE = ("Classification", "QuestionAnswering", "MaskedLM", "MultipleChoice", "RewardModel")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)


def source_of(name: str, argument: str = "model.name") -> tuple[str, dict[str, str]]:
    """`from_pretrained` arguments of a hub name, a folder (as an absolute path) or a GGUF file.

    Raises:
        ValueError: there is no such folder or file, or the package gguf is missing.
    """
    path = expanded(name, argument)
    try:
        there, folder = path.exists(), bool(name) and path.is_dir()
    except OSError:  # a name that is too long, or a folder that may not be looked into
        there = folder = False
    if path.suffix == ".gguf":
        if not there or folder:
            raise ValueError(f"`{argument}`: no GGUF file at {name!r}; check the path")
        if find_spec("gguf") is None:
            raise ValueError(
                f"`{argument}`: reading {name!r} needs the package gguf; "
                f"pip install 'raco-fast[gguf]'"
            )
        return str(path.parent.resolve()), {"gguf_file": path.name}
    if folder:
        return str(path.resolve()), {}
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if there or looks_like_a_path or len(name) > 200:
        raise ValueError(
            f"`{argument}` must be a folder with a saved model, a .gguf file or a hub name "
            f"('organisation/name'); {name!r} is none of them on this machine"
        )
    return name, {}


def has_tokenizer(source: str) -> bool:
    """Whether a folder or a hub's repository, as `source_of` gives it, holds a tokenizer."""
    if Path(source).is_dir():
        return any(Path(source, file).is_file() for file in _TOKENIZER_FILES)
    from transformers.utils.hub import cached_file

    return bool(cached_file(source, "tokenizer_config.json", **_QUIETLY))


# `cached_file` gives None where there is no such file, instead of an error.
_QUIETLY = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def load_tokenizer_of(name: str, argument: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, folder or GGUF file; its padding token defaults to its EOS.

    Raises:
        ValueError: it is not there, is damaged, or gives one token for every text.
    """
    from transformers import AutoTokenizer

    source, of_file = source_of(name, argument)
    cure = "use a complete copy of it, or name another tokenizer as `model.tokenizer`"
    with LoadErrors(argument, name, cure):
        tokenizer = AutoTokenizer.from_pretrained(source, **of_file)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        len(tokenizer(" a b").input_ids)  # a damaged file may be read and fail at the first text
    return tokenizer


def config_of(name: str, argument: str, revision: str | None) -> PreTrainedConfig:
    """The config of the model called `name`, without its weights; arguments as below.

    Raises:
        ValueError: there is no such model, or its config cannot be read.
    """
    import transformers

    source, of_file = source_of(name, argument)
    with LoadErrors(argument, name, _CURE):
        return transformers.AutoConfig.from_pretrained(
            source, revision=revision or "main", **of_file
        )


def _set_attention(name: str, model: PreTrainedModel, attention: str | None) -> None:
    if attention is None:
        return
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"`model.attention` must be one that {name!r} and this machine have, got "
            f"{attention!r}: {str(error).splitlines()[0]}; leave it out, or use 'sdpa' or 'eager'"
        ) from error
    used = model.config._attn_implementation
    if used != attention:  # transformers says so in its log, and goes on with another
        raise ValueError(
            f"`model.attention` must be one that {name!r} has, got {attention!r}, for which "
            f"transformers takes {used!r}; leave it out"
        )


def load_causal_lm(
    name: str,
    options: ModelOptions,
    argument: str = "model.name",
    *,
    changed_by: str | None,
    revision: str | None = None,
) -> PreTrainedModel:
    """The causal LM called `name`, with the dtype and switches of `options`, on the CPU.

    Args:
        argument: the setting that `name` comes from.
        revision: the version of it on the hub; None: the newest.
        changed_by: what will change its own weights, such as full fine-tuning; None: nothing.
    Raises:
        ValueError: there is no such model; it cannot be read; it is no causal LM; weights are
            missing or have another shape; it is quantized and its own weights would change, or its
            method's package is missing or cannot train.
    """
    import transformers

    assert options.dtype != "auto", "it is settled before a model is loaded"
    source, of_file = source_of(name, argument)
    arguments: dict[str, Any] = {"dtype": DTYPES[options.dtype], **of_file}
    if of_file:
        if hasattr(transformers, "GgufConfig"):  # older releases always unpack
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        arguments["revision"] = revision or "main"
        config = config_of(name, argument, revision)
        _check_kind(name, argument, config)
        _check_quantized(name, argument, config, changed_by)
    with LoadErrors(argument, name, _CURE):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    _check_complete(name, argument, model, found)
    _set_attention(name, model, options.attention)
    quantizer = getattr(model, "hf_quantizer", None)
    if of_file and quantizer is not None:
        # The weights are dense now; left marked as GGUF they could not be saved or trained.
        quantizer.remove_quantization_config(model)
    elif quantizer is not None and not quantizer.is_trainable:
        raise ValueError(
            f"`{argument}`: no adapter can be trained on {name!r}, whose quantization "
            f"({_method(model.config)}) has no gradients; use the model it was made from"
        )
    # RWKV divides its weights in place whenever it is evaluated, and would save them so.
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0
    if options.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def to_device(model: Any, device: torch.device) -> Any:
    """A model on `device`; quantized weights may have to stay where they were loaded."""
    quantized = getattr(model, "hf_quantizer", None) is not None
    return model if quantized and model.device == device else model.to(device)


def _check_kind(name: str, argument: str, config: PreTrainedConfig) -> None:
    """Raise ValueError, before weights are loaded, unless a config is of a causal LM."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    made_for, own = _architectures(config), getattr(config, "auto_map", None)
    own_class = isinstance(own, dict) and "AutoModelForCausalLM" in own
    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder with a decoder"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_class:
        kind = "not among the causal LMs of the installed transformers"
    elif any(word in a for a in made_for for word in _NOT_LANGUAGE):
        kind = "not trained to write text"
    if kind is not None:
        raise ValueError(
            f"`{argument}` must be a causal language model, got {name!r} "
            f"({', '.join(made_for) or type(config).__name__}, model_type "
            f"{config.model_type!r}), which is {kind}; use a model of the kind *ForCausalLM"
        )


def _check_quantized(
    name: str, argument: str, config: PreTrainedConfig, changed_by: str | None
) -> None:
    if changed_by is not None and (method := _method(config)) is not None:
        raise ValueError(
            f"`{argument}`: the weights of {name!r} are quantized ({method}), which {changed_by} "
            f"cannot change; train an adapter on them (`model.lora: {{r: 16, alpha: 32}}`), or use "
            f"the model that they were made from"
        )


def _method(config: PreTrainedConfig) -> str | None:
    """The quantization method that a config names, such as `bitsandbytes, 4 bits`."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        given = getattr(config.get_text_config(), "quantization_config", None)
    if given is None:
        return None
    values = given.to_dict() if hasattr(given, "to_dict") else given
    values = values if isinstance(values, dict) else {}
    method = values.get("quant_method")
    bits = next((b for b in (4, 8) if values.get(f"load_in_{b}bit")), values.get("bits"))
    text = str(getattr(method, "value", method) or "bitsandbytes")
    return f"{text}, {bits} bits" if bits else text


def _check_complete(
    name: str, argument: str, model: PreTrainedModel, found: dict[str, Any]
) -> None:
    """Raise ValueError where weights were not in the files; say once what was there in vain."""
    lacking = sorted(found["missing_keys"])
    if lacking:
        made_for = _architectures(model.config)
        raise ValueError(
            f"`{argument}`: {name!r} lacks {len(lacking)} weights of a {type(model).__name__}, "
            f"which would be random: {_some(lacking)} (its config.json says {made_for}); use a "
            f"complete causal language model"
        )
    if mismatched := sorted(found["mismatched_keys"], key=str):
        shapes = [f"{key} is {list(a)} for {list(b)}" for key, a, b in mismatched]
        raise ValueError(
            f"`{argument}`: {name!r} has weights of another shape than its config.json says: "
            f"{_some(shapes)}; use the config.json that belongs to the weights"
        )
    if unexpected := sorted(found["unexpected_keys"]):
        logger.warning(
            "`%s`: %d weights of %s are no part of a %s and were left out: %s",
            argument,
            len(unexpected),
            name,
            type(model).__name__,
            _some(unexpected),
        )


def _architectures(config: PreTrainedConfig) -> list[str]:
    """The classes that config.json names; none where it is damaged there."""
    given = getattr(config, "architectures", None)
    return [a for a in given if isinstance(a, str)] if isinstance(given, list) else []


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
