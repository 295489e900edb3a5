"""What a causal LM has to be to be trained: its kind, its weights as they are in the files."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_NOT_LANGUAGE = ("Classification", "QuestionAnswering", "MaskedLM", "MultipleChoice", "RewardModel")


def check_kind(name: str, argument: str, config: PreTrainedConfig) -> None:
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


def check_dense(name: str, argument: str, config: PreTrainedConfig, changed_by: str | None) -> None:
    """Raise ValueError where weights are quantized that `changed_by` would change."""
    if changed_by is not None and (method := quantization_of(config)) is not None:
        raise ValueError(
            f"`{argument}`: the weights of {name!r} are quantized ({method}), which {changed_by} "
            f"cannot change; train an adapter on them (`model.lora: {{r: 16, alpha: 32}}`), or use "
            f"the model that they were made from"
        )


def check_quantizing(argument: str, name: str, changed_by: str | None, *, is_dense: bool) -> None:
    """Raise ValueError unless a model's weights may be quantized as they are loaded.

    Args:
        argument: the setting that asks for it.
        changed_by: what would change them; None: nothing.
        is_dense: whether they are not quantized already.
    """
    if changed_by is not None:
        raise ValueError(
            f"`{argument}` is for the weights below an adapter, got {changed_by}, which quantized "
            f"weights cannot have; train an adapter (`model.lora: {{r: 16, alpha: 32}}`), or leave "
            f"it out"
        )
    if not is_dense:
        raise ValueError(
            f"`{argument}` must be left out for {name!r}, whose weights are quantized already"
        )


def warn_of_outliers(name: str, argument: str, quantizer: Any) -> None:
    """Say that the tokens of a batch change one another's rounding, where LLM.int8() has them do.

    Args:
        quantizer: of the model; None where it has none.
    """
    config: Any = getattr(quantizer, "quantization_config", None)
    if getattr(config, "load_in_8bit", False) and config.llm_int8_threshold > 0:
        logger.warning(
            "`%s`: %s was loaded with llm_int8_threshold %g: a token changes how all others of its "
            "batch are rounded, so a score depends on what is scored beside it; "
            "`model.load_in_8bit` quantizes without that",
            argument,
            name,
            config.llm_int8_threshold,
        )


def quantization_of(config: PreTrainedConfig) -> str | None:
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


def check_complete(name: str, argument: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
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
