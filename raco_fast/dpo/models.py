"""Loading the policy: any Hugging Face causal LM, a GGUF file, LoRA on top."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from raco_fast.dpo.logps import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoraOptions:
    """A LoRA adapter (arXiv:2106.09685), built by PEFT.

    Args:
        r: rank.
        alpha: scale; the adapter is multiplied by alpha / r.
        dropout: on the adapter's input.
        target_modules: module names to adapt, or "all-linear".
        modules_to_save: further modules to train in full, e.g. ["lm_head"].
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None


@dataclass(frozen=True)
class ModelOptions:
    """Where the policy comes from and how it is held.

    Args:
        name: hub name, folder, or a .gguf file.
        tokenizer: hub name or folder when it is not the model's own.
        dtype: dtype of the weights.
        device: "auto" takes CUDA where there is one.
        gradient_checkpointing: recompute activations in the backward pass.
        lora: train an adapter; None trains every weight.
    """

    name: str
    tokenizer: str | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    gradient_checkpointing: bool = False
    lora: LoraOptions | None = None


def pick_device(device: str) -> torch.device:
    """The torch device for a config's `device`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _source(name: str) -> tuple[str, dict[str, str]]:
    """`from_pretrained` arguments of a hub name, a folder or a GGUF file."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"`model`: no GGUF file at {name!r}; check the path")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if path.exists() or looks_like_a_path:
        raise ValueError(
            f"`model` must be a folder with a saved model, a .gguf file or a hub name "
            f"('organisation/name'); {name!r} is none of them on this machine"
        )
    return name, {}


def _unpacked(extra: dict[str, str]) -> dict[str, Any]:
    """Arguments that make transformers unpack a GGUF file into dense, trainable weights."""
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)  # older releases always unpack
    return {"quantization_config": gguf_config(dequantize=True)} if extra and gguf_config else {}


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of `options`; its padding token defaults to its EOS token."""
    from transformers import AutoTokenizer

    source, extra = _source(options.tokenizer or options.name)
    tokenizer = _from_pretrained(AutoTokenizer, options.tokenizer or options.name, source, extra)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(options: ModelOptions) -> PreTrainedModel:
    """The causal LM of `options` on its device, before any adapter.

    Raises:
        ValueError: the path does not exist, or the hub has no such model.
    """
    from transformers import AutoModelForCausalLM

    source, extra = _source(options.name)
    arguments = {**extra, **_unpacked(extra), "dtype": DTYPES[options.dtype]}
    model = _from_pretrained(AutoModelForCausalLM, options.name, source, arguments)
    if extra:
        # The weights are dense now; left marked as GGUF they could not be saved or trained.
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(pick_device(options.device))


def _from_pretrained(auto_class: Any, name: str, source: str, extra: dict[str, Any]) -> Any:
    try:
        return auto_class.from_pretrained(source, **extra)
    except OSError as error:  # transformers' way of saying: not there, or no such file in it
        raise ValueError(f"`model`: {name!r} cannot be loaded: {error}") from error


def add_adapter(model: PreTrainedModel, lora: LoraOptions | None) -> nn.Module:
    """The policy to train: `model` itself, or `model` with a fresh LoRA adapter."""
    policy: nn.Module = model
    if lora is None:
        return policy
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
    )
    policy = get_peft_model(model, config)
    return policy


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights: names, shapes, dtypes and 64 evenly spaced values a tensor.

    Reading every byte of an 8B model would cost more than the cache it keys saves; two different
    checkpoints that agree on all these values do not occur by training.
    """
    config = unwrap(model).config.to_diff_dict()
    config.pop("_name_or_path", None)  # where it lies says nothing about what it computes
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64)
        sample = flat[places.long().to(flat.device)]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()
