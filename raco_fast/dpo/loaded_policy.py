"""The policy of a run whose model the caller has in memory: a causal LM, or one with an adapter.

A model goes the way that one of a folder goes, from there on where it is loaded. An adapter of PEFT
that is on it already is continued. What is in memory has no name that it could be loaded by again:
the base of a trained adapter is saved beside it, whatever it was loaded from, since nobody can tell
whether it has changed since.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from raco_fast.dpo.data.memory_rows import MEMORY
from raco_fast.dpo.decoders import unwrap
from raco_fast.dpo.loading import check_loaded
from raco_fast.dpo.models import ModelOptions, fingerprint, hash_of, tensors_of, trainable
from raco_fast.dpo.policy import KeepBase, Policy, add_adapter
from raco_fast.dpo.saved_adapters import SavedAdapter, check_kind_of_adapter, hash_with
from raco_fast.dpo.scoring import adapter_off

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    LoadedModel: TypeAlias = PreTrainedModel | PeftModel

_ONLY = "default"  # PEFT's name of an adapter that is given none


def memory_name(model: LoadedModel) -> str:
    """What `model.name` is for a model in memory: no folder's name, no hub's."""
    return MEMORY + type(unwrap(model)).__name__


def adapter_on(model: LoadedModel, options: ModelOptions) -> SavedAdapter | None:
    """The adapter that a loaded model has; None where it has none.

    Raises:
        ValueError: options that are for a model on disk, or would make a second adapter; several
            adapters, one that is frozen, merged into its base, or of a kind that is not trained
            here; trained weights that are no part of it, and so would not be saved.
    """
    config = getattr(model, "peft_config", None)
    of_name: dict[str, Any] = {"adapter": "continue", "base": None, "revision": None}
    of_name |= {"load_in_4bit": False, "load_in_8bit": False}
    of_name |= {"reference": "initial"} if config is None else {"lora": None}
    for key, usual in of_name.items():
        if (value := getattr(options, key)) != usual:
            has = "no adapter" if config is None else "an adapter already"
            raise ValueError(
                f"`model.{key}` must be left out for a loaded model that has {has}, got {value!r}; "
                f"save it and name its folder to use it so"
            )
    if config is None:
        return None
    if not hasattr(model, "get_base_model"):
        raise ValueError(
            "`model` must have its adapter by PEFT's get_peft_model or PeftModel.from_pretrained, "
            "got one that transformers has added, whose files name no base; use one of the two"
        )
    if list(config) != [_ONLY]:
        raise ValueError(
            f"`model` must have one adapter, called {_ONLY!r}, got {list(config)}; delete the "
            f"others, or load it under that name"
        )
    if getattr(unwrap(model), "hf_quantizer", None) is not None:
        raise ValueError(
            "`model` must have its adapter on weights that are not quantized, got one whose base "
            "could not be saved beside it; save the adapter, and name its folder with "
            "`model.load_in_4bit` or `model.load_in_8bit`"
        )
    name = memory_name(model)
    check_kind_of_adapter("model", name, config[_ONLY])
    _check_trained(model)
    return SavedAdapter(name, name, config[_ONLY], name, "model")


def _check_trained(model: Any) -> None:
    from peft.utils import get_peft_model_state_dict

    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError(
            "`model` must have its adapter beside its base, got one that is merged into it; call "
            "unmerge_adapter()"
        )
    trained = trainable(model)
    if not trained:
        raise ValueError(
            "`model` must have an adapter that can be trained, got one that is frozen; load it by "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    saved = get_peft_model_state_dict(model, adapter_name=_ONLY, save_embedding_layers=False)
    kept = {tensor.data_ptr() for tensor in saved.values()}
    lost = [name for name, p in trained.items() if p.data_ptr() not in kept]
    if lost:
        raise ValueError(
            f"`model` must have no trained weights outside of its adapter, got {len(lost)}, the "
            f"first {lost[0]!r}: PEFT would not save them; freeze them, or make them part of it by "
            f"`modules_to_save`"
        )


def checked_base(model: LoadedModel, options: ModelOptions) -> PreTrainedModel:
    """The causal LM of a loaded model, below its adapter, with the switches of `options`.

    Raises:
        ValueError: as `adapter_on` and `check_loaded`.
    """
    adapted = adapter_on(model, options) is not None or options.lora is not None
    changed_by = None if adapted else "full fine-tuning"
    return check_loaded(memory_name(model), unwrap(model), options, changed_by=changed_by)


def loaded_policy(
    model: LoadedModel, options: ModelOptions, keep_base: KeepBase | None = None
) -> Policy:
    """What is trained, and what it is compared with; the model itself is changed.

    Args:
        model: of which `checked_base` is the causal LM.
        keep_base: as in `make_policy`.
    """
    found, base = adapter_on(model, options), unwrap(model)
    home: str | None = None
    if found is None:
        base_hash = fingerprint(base)
        if options.lora is not None and keep_base is not None:
            home = keep_base(base, base_hash, None)
        return Policy(
            add_adapter(base, options.lora, home), None, base_hash, base_hash, adapter_off
        )
    adapted: Any = model
    prefix = adapted.base_model.prefix
    base_hash = hash_of(base, _below(tensors_of(base), prefix))
    if keep_base is not None:
        weights = dict(_below(base.state_dict().items(), prefix))
        adapted.peft_config[_ONLY].base_model_name_or_path = keep_base(base, base_hash, weights)
    start = hash_with(model, _ONLY, base_hash)
    if options.reference == "base":
        return Policy(adapted, found, start, base_hash, adapter_off)
    return Policy(adapted, found, start, start, _as_it_is)


def _as_it_is(model: nn.Module) -> nullcontext[None]:
    return nullcontext()


def _below(tensors: Iterable[tuple[str, Tensor]], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a base by the names that they have without the adapter on it.

    Args:
        prefix: of the adapter's own parameters, `lora_` for one.
    """
    for name, tensor in tensors:
        parts = name.split(".")
        if any(part.startswith(prefix) or part == "modules_to_save" for part in parts):
            continue
        yield ".".join(p for p in parts if p not in ("base_layer", "original_module")), tensor
