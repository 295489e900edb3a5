"""The policy of a run: a causal LM itself, a fresh LoRA adapter on it, or an adapter of before.

Where `model.name` is an adapter, `model.adapter` says what becomes of it:

    continue   its weights are trained on, with its own rank, scale and modules
    merge      it is added to its base's weights, which are then the base of a run
    reference  it stays as it is and is the reference; the policy starts from the base

The reference is the policy before training, unless the adapter is it or `model.reference: base`
takes the continued adapter off. The saved adapter names its base. Where nothing on disk is that
base - it was unpacked from a GGUF file, or an adapter was merged into it - it is saved beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raco_fast.dpo.data.memory_rows import MEMORY
from raco_fast.dpo.load_errors import LoadErrors
from raco_fast.dpo.loading import (
    config_of,
    has_tokenizer,
    load_causal_lm,
    load_tokenizer_of,
    source_of,
    to_device,
)
from raco_fast.dpo.models import LoraOptions, ModelOptions, fingerprint, pick_device
from raco_fast.dpo.saved_adapters import (
    SavedAdapter,
    attached,
    check_agrees,
    find_adapter,
    hash_with,
    linear_layers,
)
from raco_fast.dpo.scoring import adapter_off

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_REFERENCE = "reference"  # the adapter of that name; the trained one is PEFT's "default"

KeepBase = Callable[["PreTrainedModel", str, "Mapping[str, torch.Tensor] | None"], str]


@dataclass(frozen=True)
class Policy:
    """What is trained, and what it is compared with.

    Args:
        model: its trained parameters require gradients.
        found: the adapter that `model.name` is; None where it is a model.
        model_hash: of all that the policy starts from.
        reference_hash: of what the reference computes.
        as_reference: gives a context in which the untrained `model` computes what the reference
            does.
    """

    model: nn.Module
    found: SavedAdapter | None
    model_hash: str
    reference_hash: str
    as_reference: Callable[[nn.Module], AbstractContextManager[None]]

    @property
    def starts_at_reference(self) -> bool:
        """Whether the reference is the policy before training."""
        return self.model_hash == self.reference_hash


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of `options`: its own, the model's, or that of an adapter's base.

    Raises:
        ValueError: as `load_tokenizer_of` and `find_adapter`.
    """
    trust = options.trust_remote_code
    if options.tokenizer is not None:
        return load_tokenizer_of(options.tokenizer, "model.tokenizer", trust=trust)
    found, revision = find_adapter(options), options.revision
    if found is None or has_tokenizer(found.source, revision):
        return load_tokenizer_of(options.name, "model.name", revision=revision, trust=trust)
    return load_tokenizer_of(found.base, found.base_from, revision=found.revision, trust=trust)


def load_config(options: ModelOptions) -> PreTrainedConfig:
    """The config of the causal LM that `load_base_model` loads.

    Raises:
        ValueError: as `config_of` and `find_adapter`.
    """
    found = find_adapter(options)
    if found is None:
        return config_of(options.name, "model.name", options.revision, options.trust_remote_code)
    return config_of(found.base, found.base_from, found.revision, options.trust_remote_code)


def load_base_model(options: ModelOptions, device: torch.device | None = None) -> PreTrainedModel:
    """The causal LM of `options` on its device, or on `device`, before any adapter.

    Raises:
        ValueError: as `load_causal_lm` and `find_adapter`.
    """
    found, device = find_adapter(options), device or pick_device(options.device)
    if found is None:
        changed_by = None if options.lora else "full fine-tuning"
        model = load_causal_lm(
            options.name, options, changed_by=changed_by, revision=options.revision, device=device
        )
    else:
        if find_adapter(ModelOptions(found.base, device="cpu")) is not None:
            raise ValueError(
                f"`model.name`: the base {found.base!r} of the adapter {options.name!r} is an "
                f"adapter itself; merge that one into its own base first"
            )
        changed_by = "`model.adapter: merge`" if options.adapter == "merge" else None
        model = load_causal_lm(
            found.base,
            options,
            found.base_from,
            changed_by=changed_by,
            revision=found.revision,
            device=device,
        )
    return to_device(model, device)


def make_policy(
    base: PreTrainedModel, options: ModelOptions, keep_base: KeepBase | None = None
) -> Policy:
    """What is trained, on the base that `load_base_model` has loaded; `base` itself is changed.

    Args:
        keep_base: saves a base that no folder or hub name gives, and returns where it is; the
            last argument is its weights, where they are not those of the model.
    Raises:
        ValueError: the adapter does not fit its base or cannot be used as `options` ask; it is
            continued, and `model.lora` says something else.
    """
    found, base_hash = find_adapter(options), fingerprint(base)
    if found is not None and options.adapter == "merge":
        base = _merged(base, found)
        base_hash = fingerprint(base)
    home = source_of(options.name if found is None else found.base)[0]
    if keep_base is not None and base_is_nowhere(options, found):
        home = keep_base(base, base_hash, None)
    if found is None or options.adapter == "merge":
        revision = options.revision if found is None else None
        model = add_adapter(base, options.lora, home, revision)
        return Policy(model, found, base_hash, base_hash, adapter_off)
    if options.adapter == "reference":
        return _compared_with(found, base, base_hash, options, home)
    return _continued(found, base, base_hash, options, home)


def trains_adapter(options: ModelOptions, found: SavedAdapter | None) -> bool:
    """Whether an adapter is trained, and not the weights of a whole model."""
    return options.lora is not None or (found is not None and options.adapter == "continue")


def base_is_nowhere(options: ModelOptions, found: SavedAdapter | None) -> bool:
    """Whether no folder and no hub name is the model below the trained adapter."""
    if not trains_adapter(options, found):
        return False
    merged = found is not None and options.adapter == "merge"
    base = options.name if found is None else found.base
    return merged or base.endswith(".gguf") or base.startswith(MEMORY)


def add_adapter(
    model: PreTrainedModel,
    lora: LoraOptions | None,
    home: str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """The policy to train: `model` itself, or `model` with a fresh LoRA adapter.

    Args:
        home: where the saved adapter says that its base is; None: where `model` was loaded from.
        revision: the version of it on the hub, which the adapter says too.
    """
    policy: nn.Module = model
    if lora is None:
        return policy
    from peft import get_peft_model

    config = _lora_config(lora)
    policy = get_peft_model(model, config)
    config.base_model_name_or_path = home or model.name_or_path
    config.revision = revision
    return policy


def _lora_config(lora: LoraOptions) -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
    )


def _continued(
    found: SavedAdapter, base: PreTrainedModel, base_hash: str, options: ModelOptions, home: str
) -> Policy:
    """The adapter trained on; the reference is it as it was, or its base."""
    linear = linear_layers(base)
    before = _probe(base) if options.reference == "base" else None
    model = attached(base, found, "default", trained=True)
    if options.lora is not None:
        check_agrees(options.lora, found, model, linear)
    model.peft_config["default"].base_model_name_or_path = home
    start = hash_with(model, "default", base_hash)
    if before is None:
        return Policy(model, found, start, start, lambda model: nullcontext())
    with adapter_off(model):
        if not torch.equal(before, _probe(model)):
            raise ValueError(
                f"`model.reference: base`: the adapter {found.name!r} changes weights of its base "
                f"itself, so switching it off does not give the base; use `model.reference: "
                f"initial`"
            )
    return Policy(model, found, start, base_hash, adapter_off)


def _compared_with(
    found: SavedAdapter, base: PreTrainedModel, base_hash: str, options: ModelOptions, home: str
) -> Policy:
    """A fresh adapter on the base; the reference is the base with the adapter of before."""
    assert options.lora is not None
    if found.kind != "LORA":
        raise ValueError(
            f"`model.adapter: reference` needs a LoRA adapter, since PEFT holds adapters of one "
            f"kind only, got {found.name!r} of the kind {found.kind}; use `model.adapter: merge`"
        )
    before = _probe(base)
    model = attached(base, found, _REFERENCE, trained=False)
    reference = hash_with(model, _REFERENCE, base_hash)
    with LoadErrors("model.lora", found.name, "choose other `model.lora.target_modules`"):
        model.add_adapter("default", _lora_config(options.lora))
    fresh = model.peft_config["default"]
    fresh.base_model_name_or_path, fresh.revision = home, found.revision
    model.set_adapter("default")
    if not torch.equal(before, _probe(model)):
        raise ValueError(
            f"`model.adapter: reference`: the adapter {found.name!r} changes weights of its base "
            f"itself, so the policy cannot start from the base; use `model.adapter: merge`"
        )
    return Policy(model, found, base_hash, reference, partial(_adapter_on, name=_REFERENCE))


@contextmanager
def _adapter_on(model: Any, name: str) -> Iterator[None]:
    """A context in which a PEFT model has another adapter on than the one that is trained."""
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter("default")


def _merged(base: PreTrainedModel, found: SavedAdapter) -> PreTrainedModel:
    """The base with an adapter added to its weights."""
    trained = {name: p.requires_grad for name, p in base.named_parameters()}
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    model = attached(base, found, "default", trained=False)
    ends = (base.get_output_embeddings(), base.get_input_embeddings())
    if tied and any(not isinstance(end, nn.Linear | nn.Embedding) for end in ends):
        raise ValueError(
            f"`model.adapter: merge`: the adapter {found.name!r} adapts the embedding or the head, "
            f"which are one weight in its base {found.base!r}; merged, it would change both. Use "
            f"`model.adapter: continue`"
        )
    before = _probe(model)
    with LoadErrors("model.name", found.name, "use `model.adapter: continue`"):
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    change, size = (_probe(merged) - before).norm(), before.norm()
    # Each weight was rounded once more, which hundreds of layers of bfloat16 add up.
    if not change <= (1e-3 if merged.dtype == torch.float32 else 0.1) * size:
        raise ValueError(
            f"`model.adapter: merge`: merging changes what {found.name!r} computes, by more than "
            f"rounding; use `model.adapter: continue`"
        )
    for name, p in merged.named_parameters():
        p.requires_grad_(trained[name])
    return merged


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """The logits of a few tokens, to compare a model with itself."""
    was_training = model.training
    known = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 9, device=model.device)[None] % known
    logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    return logits
