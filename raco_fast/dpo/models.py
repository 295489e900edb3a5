"""Loading the policy: any Hugging Face causal LM, a GGUF file, LoRA on top."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from raco_fast.dpo.data.choices import check_choices
from raco_fast.dpo.decoders import decoder_of, unwrap
from raco_fast.dpo.launch import launched
from raco_fast.settings.paths import expanded

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

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("r", self.r >= 1, "be at least 1"),
            ("alpha", self.alpha >= 1, "be at least 1: with 0 nothing is learnt"),
            ("dropout", 0 <= self.dropout < 1, "be in [0, 1)"),
        ):
            if not holds:
                raise ValueError(f"`lora.{name}` must {rule}, got {getattr(self, name)}")


@dataclass(frozen=True)
class ModelOptions:
    """Where the policy comes from and how it is held.

    Args:
        name: hub name, folder, or a .gguf file.
        tokenizer: hub name or folder when it is not the model's own.
        dtype: dtype of the weights.
        device: "auto" takes CUDA where there is one; of several processes, each its own GPU.
        gradient_checkpointing: recompute activations in the backward pass.
        dropout: train with the model's own dropout, and whatever else it does in training alone.
            By default it learns in the mode in which its reference is scored, so that the two are
            compared without noise. An adapter's dropout is `lora.dropout`.
        lora: train an adapter; None trains every weight.
    """

    name: str
    tokenizer: str | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    gradient_checkpointing: bool = False
    dropout: bool = False
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        pick_device(self.device)


def pick_device(device: str) -> torch.device:
    """The torch device for a config's `device`; ValueError if this machine has no such one.

    Of several processes on a machine each has a GPU of its own, that of its LOCAL_RANK.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    launch = launched()
    if launch is not None and launch.size > 1 and device.startswith("cuda"):
        device = _gpu_of(launch.local_rank, device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name; torch built without CUDA
        raise ValueError(
            f"`device` must be 'auto', 'cpu' or a GPU of this machine such as 'cuda:0', "
            f"got {device!r}: {str(error).splitlines()[0]}"
        ) from error
    return torch.device(device)


def _gpu_of(local_rank: int, device: str) -> str:
    """The GPU of one of several processes; checked before a CUDA context takes memory anywhere."""
    if device != "cuda":
        raise ValueError(
            f"`device` must be 'auto', 'cuda' or 'cpu' where a launcher has started several "
            f"processes, each of which takes the GPU of its LOCAL_RANK, got {device!r}; choose "
            f"GPUs with CUDA_VISIBLE_DEVICES"
        )
    gpus = torch.cuda.device_count()
    if local_rank >= gpus > 0:
        raise ValueError(
            f"every process needs a GPU of its own, but LOCAL_RANK is {local_rank} and this "
            f"machine shows {gpus} GPU(s); start at most {gpus} processes here (torchrun "
            f"--nproc-per-node {gpus}), or train with `model.device: cpu`"
        )
    return f"cuda:{local_rank}"


def _source(name: str) -> tuple[str, dict[str, str]]:
    """`from_pretrained` arguments of a hub name, a folder or a GGUF file."""
    path = expanded(name, "model.name")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"`model`: no GGUF file at {name!r}; check the path")
        if find_spec("gguf") is None:
            raise ValueError(
                f"`model`: reading {name!r} needs the package gguf; pip install 'raco-fast[gguf]'"
            )
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


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of `options`; its padding token defaults to its EOS token.

    Raises:
        ValueError: as `load_base_model`.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, options.tokenizer or options.name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(options: ModelOptions, device: torch.device | None = None) -> PreTrainedModel:
    """The causal LM of `options` on its device, or on `device`, before any adapter.

    Raises:
        ValueError: the path does not exist, the hub has no such model, it cannot be read, or it is
            a GGUF file and the package gguf is missing.
    """
    import transformers

    arguments = {"dtype": DTYPES[options.dtype]}
    is_gguf = options.name.endswith(".gguf")
    if is_gguf and hasattr(transformers, "GgufConfig"):  # older releases always unpack
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _from_pretrained(transformers.AutoModelForCausalLM, options.name, **arguments)
    quantizer = getattr(model, "hf_quantizer", None)
    if is_gguf and quantizer is not None:
        # The weights are dense now; left marked as GGUF they could not be saved or trained.
        quantizer.remove_quantization_config(model)
    # RWKV divides its weights in place whenever it is evaluated, and would save them so.
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0
    if options.gradient_checkpointing:
        enable_checkpointing(model)
    return model.to(device or pick_device(options.device))


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; several backward passes may share a graph."""
    # transformers 5.23 renamed the method and its argument.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _from_pretrained(auto_class: Any, name: str, **arguments: Any) -> Any:
    source, of_file = _source(name)
    try:
        return auto_class.from_pretrained(source, **of_file, **arguments)
    # transformers raises OSError where there is no such model, or a file of it is missing.
    except (OSError, SafetensorError) as error:
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


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a causal LM repeats, in order; none where they are not in a list."""
    causal_lm = unwrap(model)
    decoder = decoder_of(causal_lm) or causal_lm
    lists = [block for block in decoder.children() if isinstance(block, nn.ModuleList)]
    return [layer for block in lists for layer in block]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fingerprint(model: nn.Module) -> str:
    """Hash of what a model computes: its configuration and every byte of its weights.

    A CRC-32 of each tensor and SHA-256 over those: fast enough beside reading them from disk.
    """
    config = unwrap(model).config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)  # neither changes what the model computes
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        shape = tuple(tensor.shape)
        digest.update(f"{name}{shape}{tensor.dtype}{zlib.crc32(content)}".encode())
    return digest.hexdigest()
