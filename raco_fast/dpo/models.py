"""The options of a policy, and what is asked of any language model: device, layers, identity."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from raco_fast.dpo.data.choices import check_choices
from raco_fast.dpo.decoders import decoder_of, unwrap
from raco_fast.dpo.launch import launched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        name: hub name, folder, or a .gguf file; of a model, or of an adapter that PEFT has saved.
        tokenizer: hub name or folder when it is not the model's own.
        adapter: what becomes of that adapter. `continue` trains it on, with its own rank, scale and
            modules. `merge` adds it to its base's weights, rounded to `dtype`; what `lora` says
            is trained on the result. With `reference` it is the reference, and a fresh one, which
            `lora` describes, is trained from the base.
        reference: of a continued adapter: `initial`, the policy before training, or `base`, its
            base alone.
        base: the model below the adapter, where that is not what its adapter_config.json names.
        revision: of `name` on the hub: a commit, a branch or a tag; None: the newest.
        trust_remote_code: run the code that a model's or tokenizer's own repository holds, which
            may do anything on this machine. Name a commit as `revision`, or the code of tomorrow is
            run as well.
        load_in_4bit, load_in_8bit: quantize the weights below an adapter by bitsandbytes as they
            are loaded: 4 bits as QLoRA has them (arXiv:2305.14314), or LLM.int8()
            (arXiv:2208.07339) without columns of outliers. Whoever loads the adapter has to
            quantize its base alike.
        dtype: dtype of the weights. `auto` is the one in which a model of this size trains faster
            on this device, measured when a run begins and kept with it; not the dtype of the
            files, which transformers means by it.
        device: "auto" takes CUDA where there is one; of several processes, each its own GPU.
        attention: how transformers computes it (its `attn_implementation`), such as flex_attention,
            which on a GPU leaves out what packed rows do not see, or flash_attention_2; None: the
            model's own choice.
        gradient_checkpointing: recompute activations in the backward pass.
        dropout: train with the model's own dropout, and whatever else it does in training alone.
            By default it learns in the mode in which its reference is scored, so that the two are
            compared without noise. An adapter's dropout is `lora.dropout`.
        lora: train a fresh adapter; None trains every weight, or a continued adapter.
    """

    name: str
    tokenizer: str | None = None
    adapter: Literal["continue", "merge", "reference"] = "continue"
    reference: Literal["initial", "base"] = "initial"
    base: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    dtype: Literal["fp32", "bf16", "auto"] = "fp32"
    device: str = "auto"
    attention: str | None = None
    gradient_checkpointing: bool = False
    dropout: bool = False
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        pick_device(self.device)
        if self.reference == "base" and self.adapter != "continue":
            raise ValueError(
                f"`model.reference: base` is for `model.adapter: continue`, got {self.adapter!r}; "
                f"leave one of them out"
            )
        if self.adapter == "reference" and self.lora is None:
            raise ValueError(
                "`model.adapter: reference` needs `model.lora`, the adapter to train, got None; "
                "set it, or use `model.adapter: merge` to start from the adapter"
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError(
                "`model.load_in_4bit` and `model.load_in_8bit` must not be set both; leave one out"
            )
        if self.quantized and find_spec("bitsandbytes") is None:
            raise ValueError(
                f"`model.{self.quantized}` needs the package bitsandbytes; "
                f"pip install 'raco-fast[bitsandbytes]'"
            )

    @property
    def quantized(self) -> str | None:
        """The setting that quantizes the weights, if one does."""
        if self.load_in_4bit:
            return "load_in_4bit"
        return "load_in_8bit" if self.load_in_8bit else None


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


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; several backward passes may share a graph."""
    # transformers 5.23 renamed the method and its argument.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


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
    return hash_of(model, tensors_of(model))


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All that a model computes with, by name.

    The scales of quantized weights are neither parameters nor buffers; without them a model is the
    same as one with all of them doubled.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if getattr(unwrap(model), "hf_quantizer", None) is None:
        return tensors
    known = {name for name, _ in tensors}
    state = model.state_dict().items()
    return tensors + [(n, t) for n, t in state if n not in known and isinstance(t, Tensor)]


def hash_of(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of a model's configuration and of some of its tensors, by their names."""
    config = unwrap(model).config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)  # neither changes what the model computes
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    hash_of_tensors(digest, tensors)
    return digest.hexdigest()


def hash_of_tensors(digest: hashlib._Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Feed names, shapes, dtypes and contents into a hash."""
    for name, tensor in tensors:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        shape = tuple(tensor.shape)
        digest.update(f"{name}{shape}{tensor.dtype}{zlib.crc32(content)}".encode())
