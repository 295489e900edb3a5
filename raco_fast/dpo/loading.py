"""Loading a whole causal LM and its tokenizer: from the hub, a folder or a GGUF file.

Nothing is loaded that would train in silence as something else than its name says: weights that are
missing would be random, an encoder sees the tokens it is to predict, and quantized weights have no
gradient.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raco_fast.dpo.causal_lm_checks import (
    check_complete,
    check_dense,
    check_kind,
    check_quantizing,
    quantization_of,
    warn_of_outliers,
)
from raco_fast.dpo.data.memory_rows import MEMORY
from raco_fast.dpo.load_errors import LoadErrors
from raco_fast.dpo.models import DTYPES, ModelOptions, enable_checkpointing
from raco_fast.settings.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CURE = "use a complete copy of it, as `save_pretrained` or a download writes it"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)


def source_of(name: str, argument: str = "model.name") -> tuple[str, dict[str, str]]:
    """`from_pretrained` arguments of a hub name, a folder (as an absolute path) or a GGUF file.

    Raises:
        ValueError: there is no such folder or file, or the package gguf is missing.
    """
    if name.startswith(MEMORY):
        raise ValueError(
            f"`{argument}` must be a folder, a .gguf file or a hub name, got {name!r}, which "
            "stands for an object in the memory of another program; save that, and name its folder"
        )
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


def has_tokenizer(source: str, revision: str | None = None) -> bool:
    """Whether a folder or a hub's repository, as `source_of` gives it, holds a tokenizer."""
    if Path(source).is_dir():
        return any(Path(source, file).is_file() for file in _TOKENIZER_FILES)
    from transformers.utils.hub import cached_file

    return bool(cached_file(source, "tokenizer_config.json", revision=revision, **_QUIETLY))


# `cached_file` gives None where there is no such file, instead of an error.
_QUIETLY = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def load_tokenizer_of(
    name: str, argument: str, *, revision: str | None = None, trust: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, folder or GGUF file; its padding token defaults to its EOS.

    Args:
        revision: the version of it on the hub; None: the newest.
        trust: run its repository's own code, if there is any.

    Raises:
        ValueError: it is not there, is damaged, or gives one token for every text.
    """
    from transformers import AutoTokenizer

    source, of_file = source_of(name, argument)
    cure = "use a complete copy of it, or name another tokenizer as `model.tokenizer`"
    with LoadErrors(argument, name, cure):
        found = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust, **of_file
        )
        tokenizer = with_padding(found)
        len(tokenizer(" a b").input_ids)  # a damaged file may be read and fail at the first text
    return tokenizer


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself; its padding token defaults to its EOS."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def config_of(
    name: str, argument: str, revision: str | None, trust: bool = False
) -> PreTrainedConfig:
    """The config of the model called `name`, without its weights; arguments as above.

    Raises:
        ValueError: there is no such model, or its config cannot be read.
    """
    import transformers

    source, of_file = source_of(name, argument)
    with LoadErrors(argument, name, _CURE):
        return transformers.AutoConfig.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust, **of_file
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
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The causal LM called `name`, with the dtype and switches of `options`, on the CPU.

    Args:
        argument: the setting that `name` comes from.
        revision: the version of it on the hub; None: the newest.
        changed_by: what will change its own weights, such as full fine-tuning; None: nothing.
        device: where weights that `options` quantize are put; None: on the CPU.
    Raises:
        ValueError: there is no such model; it cannot be read; it is no causal LM; weights are
            missing or have another shape; it is quantized, or to be, and its own weights would
            change, or its method's package is missing or cannot train.
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
        trust = options.trust_remote_code
        config = config_of(name, argument, revision, trust)
        arguments["trust_remote_code"] = trust
        check_kind(name, argument, config)
        check_dense(name, argument, config, changed_by)
    if options.quantized:
        is_dense = of_file or quantization_of(config) is None
        check_quantizing(f"model.{options.quantized}", name, changed_by, is_dense=bool(is_dense))
        arguments["quantization_config"] = _bitsandbytes(options)
        arguments["device_map"] = {"": str(device or "cpu")}
    with LoadErrors(argument, name, _CURE):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    check_complete(name, argument, model, found)
    if of_file and getattr(model, "hf_quantizer", None) is not None:
        # The weights are dense now; left marked as GGUF they could not be saved or trained.
        model.hf_quantizer.remove_quantization_config(model)
    return _made_ready(name, argument, model, options)


def _bitsandbytes(options: ModelOptions) -> Any:
    """What quantizes weights while they are loaded."""
    from transformers import BitsAndBytesConfig

    if options.load_in_8bit:
        # Its columns of outliers are found over all tokens at once, so that one token would change
        # how the others are rounded: also those before it, and those of other pairs.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[options.dtype],
    )


def check_loaded(
    name: str, model: PreTrainedModel, options: ModelOptions, *, changed_by: str | None
) -> PreTrainedModel:
    """A causal LM that somebody else has loaded, with the switches of `options`.

    Args:
        name: for messages.
        changed_by: as in `load_causal_lm`.
    Raises:
        ValueError: it is no causal LM, or is not in one memory; it is quantized and its own weights
            would change, or its method cannot train.
    """
    check_kind(name, "model", model.config)
    check_dense(name, "model", model.config, changed_by)
    places = {str(p.device) for p in model.parameters()}
    if len(places) > 1 or "meta" in places:
        raise ValueError(
            f"`model` must have its weights on one device, got {name} with some on each of "
            f"{sorted(places)}; load it without `device_map`"
        )
    return _made_ready(name, "model", model, options)


def _made_ready(
    name: str, argument: str, model: PreTrainedModel, options: ModelOptions
) -> PreTrainedModel:
    """A loaded model with the switches of `options`; ValueError where it cannot train."""
    _set_attention(name, model, options.attention)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise ValueError(
            f"`{argument}`: no adapter can be trained on {name!r}, whose quantization "
            f"({quantization_of(model.config)}) has no gradients; use the model it was made from"
        )
    warn_of_outliers(name, argument, quantizer)
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
