"""An adapter that PEFT has saved: found, read and put on its base, whole or not at all."""

from __future__ import annotations

import hashlib
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from raco_fast.dpo.load_errors import LoadErrors
from raco_fast.dpo.loading import source_of
from raco_fast.dpo.models import LoraOptions, ModelOptions, hash_of_tensors

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_CURE = "use a whole adapter folder, as PEFT's `save_pretrained` writes it"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_RECORDED = "base_model_name_or_path"
# What a PEFT config says that changes neither what is computed nor what is trained.
_NO_SETTING = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
_NO_SETTING |= {"peft_version", "task_type"}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk or on the hub.

    Args:
        name, source: as the config names it, and as PEFT finds it.
        base, base_from: the model it was trained on, and the setting that says so.
        version: of the adapter on the hub; None: the newest.
    """

    name: str
    source: str
    config: PeftConfig
    base: str
    base_from: str
    version: str | None = None

    @property
    def revision(self) -> str | None:
        """The version of the base on the hub that the adapter was trained on, where it says so."""
        given = self.config.revision if self.base_from == _RECORDED else None
        return given if isinstance(given, str) else None

    @property
    def kind(self) -> str:
        """PEFT's name of the kind, such as LORA."""
        return str(self.config.peft_type.value)


def find_adapter(options: ModelOptions) -> SavedAdapter | None:
    """The adapter that `model.name` is; None where it is a model.

    Raises:
        ValueError: options of an adapter for a model; an adapter that is damaged, of another task,
            of a kind that cannot be trained here, or whose base is not named or not here.
    """
    source, of_file = source_of(options.name)
    from transformers.utils import find_adapter_config_file

    if options.revision is not None and (of_file or Path(source).is_dir()):
        raise ValueError(
            f"`model.revision` is for a name of the hub, got {options.revision!r} for "
            f"{options.name!r}, which is on this machine; leave it out"
        )
    with LoadErrors("model.name", options.name, "check the name and `model.revision`"):
        file = None
        if not of_file:
            file = find_adapter_config_file(source, revision=options.revision)
    if file is None:
        for key, usual in (("adapter", "continue"), ("reference", "initial"), ("base", None)):
            if (value := getattr(options, key)) != usual:
                raise ValueError(
                    f"`model.{key}`: {value!r} is for a `model.name` that is an adapter, and "
                    f"{options.name!r} has no adapter_config.json; leave `model.{key}` out"
                )
        return None
    if Path(source, "config.json").is_file():
        raise ValueError(
            f"`model.name`: {options.name!r} holds a model (config.json) and an adapter "
            f"(adapter_config.json), and one of them would be left out; move one elsewhere"
        )
    if Path(source).is_dir() and not any(Path(source, file).is_file() for file in _WEIGHTS):
        raise ValueError(
            f"`model.name`: the adapter {options.name!r} has no {' or '.join(_WEIGHTS)}; {_CURE}"
        )
    from peft import PeftConfig

    with LoadErrors("model.name", options.name, _CURE):
        config = PeftConfig.from_pretrained(source, revision=options.revision)
        _ = config.peft_type.value
    check_kind_of_adapter("model.name", options.name, config)
    given = "model.base" if options.base is not None else _RECORDED
    base = options.base if options.base is not None else config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"`model.name`: the adapter {options.name!r} does not say what it was trained on "
            f"(base_model_name_or_path is {base!r}); name that model as `model.base`"
        )
    try:
        source_of(base, given)
    except ValueError as error:
        raise ValueError(
            f"`model.name`: the base of the adapter {options.name!r} is not here ({error}); name "
            f"it as `model.base`"
        ) from error
    return SavedAdapter(options.name, source, config, base, given, options.revision)


def check_kind_of_adapter(argument: str, name: str, config: PeftConfig) -> None:
    """Raise ValueError for an adapter that is trained by no change of layers, or for another task.

    Args:
        argument: the setting that names the adapter, or gives it.
    """
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"`{argument}`: an adapter of the kind {config.peft_type.value} adds tokens to the "
            f"prompt, which is not trained here, got {name!r}; use LoRA or another kind that "
            f"changes layers"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"`{argument}`: {name!r} was trained for {config.task_type}, where a causal LM "
            f"(CAUSAL_LM) is needed; use an adapter of a language model"
        )


def attached(base: PreTrainedModel, found: SavedAdapter, name: str, *, trained: bool) -> Any:
    """`base` with a saved adapter's weights, all of them and nothing but them."""
    from peft import PeftModelForCausalLM

    config = deepcopy(found.config)
    config.inference_mode = not trained
    device = str(base.device)
    cure = f"name the model that it was trained on as `model.base`, or {_CURE}"
    with LoadErrors("model.name", found.name, cure):
        model = PeftModelForCausalLM(base, config, adapter_name=name)
        with warnings.catch_warnings():  # what is missing is an error below
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            version = {} if found.version is None else {"revision": found.version}
            said = model.load_adapter(
                found.source, name, is_trainable=trained, torch_device=device, **version
            )
    for what, keys in (("lacks", said.missing_keys), ("has too much", said.unexpected_keys)):
        if keys:
            raise ValueError(
                f"`model.name`: the adapter {found.name!r} {what} {len(keys)} weights for its base "
                f"{found.base!r}, the first {keys[0]!r}; {cure}"
            )
    return model


def check_agrees(lora: LoraOptions, found: SavedAdapter, model: Any, linear: set[str]) -> None:
    """Raise ValueError where `model.lora` describes another adapter than the continued one."""
    cure = "leave `model.lora` out to train it on, or use `model.adapter: merge` for a fresh one"
    if found.kind != "LORA":
        raise ValueError(
            f"`model.lora`: the adapter {found.name!r} is of kind {found.kind}; {cure}"
        )
    config = found.config
    pairs = {
        "r": (lora.r, config.r),
        "alpha": (lora.alpha, config.lora_alpha),
        "dropout": (lora.dropout, config.lora_dropout),
        "modules_to_save": (
            sorted(lora.modules_to_save or ()),
            sorted(config.modules_to_save or ()),
        ),
        "target_modules": (lora.target_modules, config.target_modules),
    }
    if lora.target_modules == "all-linear":
        adapted = {n for n, m in model.get_base_model().named_modules() if hasattr(m, "base_layer")}
        if adapted == linear:
            del pairs["target_modules"]
    elif not isinstance(lora.target_modules, str) and not isinstance(config.target_modules, str):
        pairs["target_modules"] = (sorted(lora.target_modules), sorted(config.target_modules))
    wrong = [f"{key} {a!r}, the adapter has {b!r}" for key, (a, b) in pairs.items() if a != b]
    if wrong:
        raise ValueError(
            f"`model.lora` and the continued adapter {found.name!r} disagree: `model.lora` has "
            f"{'; '.join(wrong)}; {cure}"
        )


def linear_layers(base: PreTrainedModel) -> set[str]:
    """The layers that PEFT means by "all-linear"."""
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    modules = base.named_modules()
    return {n for n, m in modules if isinstance(m, nn.Linear | Conv1D) and m is not head}


def hash_with(model: Any, name: str, base_hash: str) -> str:
    """Hash of a base and an adapter: its weights and the settings that scale and place them."""
    from peft.utils import get_peft_model_state_dict

    settings = {k: v for k, v in model.peft_config[name].to_dict().items() if k not in _NO_SETTING}
    listed = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    digest = hashlib.sha256(f"{base_hash}{sorted(listed.items())}".encode())
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    hash_of_tensors(digest, sorted(weights.items()))
    return digest.hexdigest()
