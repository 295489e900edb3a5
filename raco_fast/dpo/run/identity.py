"""What may change between a checkpoint and the run that goes on from it, setting by setting."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from raco_fast.dpo.data.rendering import TokenOptions
from raco_fast.dpo.losses.registry import described
from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.settings.plain import fields_of, members_of, shown

logger = logging.getLogger(__name__)


class Change(Enum):
    """What another value of a setting means for a run that goes on."""

    FREE = "what is learnt stays the same, but for rounding and the draws of dropout"
    CONTENT = "what is read from it has to be the same, wherever it lies and however it is named"
    TOLD = "the log says what it comes to"
    NEVER = "it would be another run"


_F, _C, _T, _N = Change.FREE, Change.CONTENT, Change.TOLD, Change.NEVER

CHANGES: dict[str, Change] = {
    # The weights of the model and the token ids and labels of the pairs are compared by content.
    **dict.fromkeys(("model.name", "model.tokenizer", "model.base", "model.revision"), _C),
    **dict.fromkeys((f"data.{n}" for n in ("path", "objective", "format", "limit")), _C),
    **dict.fromkeys((f"data.{n}" for n in ("objectives", "pairs_per_row", "config")), _C),
    **dict.fromkeys((f"data.{n}" for n in ("split", "revision", "on_bad")), _C),
    **dict.fromkeys((f"tokens.{n}" for n in ("max_length", "max_prompt_length")), _C),
    **dict.fromkeys((f"tokens.{n}" for n in ("overlength", "keep", "special_text")), _C),
    **dict.fromkeys(("tokens.chat_template", "tokens.plain", "tokens.date", "concise"), _C),
    # Held-out pairs, where the model is computed, in what portions, and what is written when.
    **dict.fromkeys(("eval_data", "model.device", "model.attention"), _F),
    **dict.fromkeys(("model.gradient_checkpointing",), _F),
    **dict.fromkeys(("batching", "pairs_per_micro_batch", "tokens_per_micro_batch"), _F),
    **dict.fromkeys(("chunk_tokens", "gradient_mode"), _F),
    **dict.fromkeys(("check_every", "eval_every", "save_every", "log_every"), _F),
    **dict.fromkeys(("output_dir", "cache_dir", "loggers", "report", "parallel", "workers"), _F),
    **dict.fromkeys(("max_skipped_steps", "save_minutes", "keep", "keep_best"), _F),
    # They are compared in `losses`, where they are worked out.
    **dict.fromkeys(("loss", "loss_options"), _F),
    # More steps: the schedule is that of the new number. None: the checkpoint's rounding.
    **dict.fromkeys(("epochs", "max_steps", "rounding"), _T),
    **dict.fromkeys(("model.dtype", "model.dropout", "model.lora"), _N),
    **dict.fromkeys(("model.adapter", "model.reference", "model.trust_remote_code"), _N),
    **dict.fromkeys(("model.load_in_4bit", "model.load_in_8bit"), _N),
    **dict.fromkeys(("reference", "margin_rewards"), _N),
    **dict.fromkeys(("weights", "c", "rule", "losses", "max_grad_norm", "seed"), _N),
    **dict.fromkeys(("gram", "gram_ema", "c_mode", "metric"), _N),
    **dict.fromkeys(("c_schedule", "weights_schedule"), _N),
    **dict.fromkeys(("lr", "betas", "eps", "weight_decay", "schedule", "warmup_ratio"), _N),
    **dict.fromkeys(("pairs_per_step",), _N),
}
"""Every setting of `TrainConfig` by its dotted name, or the name of the group that it is in."""


def keys_of(kind: Any = TrainConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings; those of data sources as of one."""
    for name, hint in fields_of(kind).items():
        inner = [m for h in members_of(hint) for m in (h, *get_args(h))]
        nested = [m for m in inner if dataclasses.is_dataclass(m)]
        yield from keys_of(nested[0], f"{prefix}{name}.") if nested else (prefix + name,)


def change_of(key: str) -> Change:
    """What another value of a setting means; of a name that is none here, that it may not be."""
    while key not in CHANGES and "." in key:
        key = key.rpartition(".")[0]
    return CHANGES.get(key, Change.NEVER)


def identity(config: TrainConfig) -> dict[str, Any]:
    """All settings, as plain JSON values, the losses as they are worked out."""
    losses = {name: described(loss) for name, loss in config.objective_losses.items()}
    given = {**dataclasses.asdict(config), "losses": losses}
    given["rounding"] = config.optimizer_arguments["rounding"]
    settings: dict[str, Any] = json.loads(json.dumps(given))
    return settings


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Dotted name -> value of all settings."""
    return dict(_flat(identity(config)))


def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of the settings that no process of a run may have otherwise."""
    return {key: value for key, value in _flat(settings) if change_of(key) is not Change.FREE}


def check_same_run(config: TrainConfig, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise ValueError, naming every differing setting, unless `config` may go on from `saved`.

    Args:
        saved: `identity` of the run that wrote the checkpoint, whose dtype `auto` stands for.
    """
    if config.model.dtype == "auto":
        model = dataclasses.replace(config.model, dtype=saved["model"]["dtype"])
        config = dataclasses.replace(config, model=model)
    never = list(_differences(config, saved, Change.NEVER))
    if config.rounding is not None and saved.get("rounding") != config.rounding:
        never.append(_difference("rounding", saved.get("rounding"), config.rounding))
    if never:
        raise ValueError(
            f"checkpoint {checkpoint} belongs to another configuration ({'; '.join(never)}); "
            "restore these settings or choose another `output_dir`"
        )
    if free := list(_differences(config, saved, Change.FREE)):
        lora = config.model.lora
        drawn = config.model.dropout or (lora is not None and lora.dropout > 0)
        note = "; dropout may draw other numbers than it would have done" if drawn else ""
        logger.info("going on with other settings: %s%s", "; ".join(free), note)


def check_same_content(
    config: TrainConfig, what: str, saved: Mapping[str, Any], now: Mapping[str, Any], where: Path
) -> None:
    """Raise ValueError unless what a run reads has the content that it had.

    Args:
        what: "data", "model" or "margin_rewards".
        saved, now: what identifies a run: `identity` under "settings", and hashes of contents.
    """
    if saved.get(what) == now.get(what):
        return
    own = {
        "model": ("model.name", "model.revision"),
        "data": ("data", "tokens", "concise", "model.tokenizer"),
        "margin_rewards": ("margin_rewards",),
    }[what]
    found = [
        text
        for text in _differences(config, saved["settings"], Change.CONTENT)
        if text.startswith(own)
    ]
    why = f" ({'; '.join(found)})" if found else ": the settings agree but its content changed"
    raise ValueError(
        f"checkpoint {where} was made with another {what}{why}; restore it or choose another "
        f"`output_dir`"
    )


def _differences(config: TrainConfig, saved: Mapping[str, Any], kind: Change) -> Iterator[str]:
    before, now = dict(_flat(saved)), dict(_flat(identity(config)))
    for key in sorted(before.keys() | now.keys()):
        # A setting that did not exist when the checkpoint was written had its default.
        was = before[key] if key in before else default_of(key)
        if change_of(key) is kind and was != now.get(key):
            yield _difference(key, was, now.get(key))


def _difference(key: str, saved: Any, now: Any) -> str:
    return f"{key}: {shown(saved)} in the checkpoint, {shown(now)} now"


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value); of data and reward sources, each field's values in a list."""
    for name, value in settings.items():
        if name in ("model", "tokens") and isinstance(value, Mapping):
            yield from ((f"{name}.{field}", inner) for field, inner in value.items())
        elif name == "data":
            yield from _of_sources(name, value)
        elif name == "margin_rewards":
            for objective, sources in value.items():
                yield from _of_sources(f"{name}.{objective}", sources)
        else:
            yield name, value


def _of_sources(name: str, sources: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    fields = dict.fromkeys(field for source in sources for field in source)
    yield from ((f"{name}.{f}", [source.get(f) for source in sources]) for f in fields)


def default_of(key: str) -> Any:
    """The default of a setting as plain JSON; None where it has none.

    A setting that did not exist when a run noted its own had this value.
    """
    group, _, name = key.rpartition(".")
    kind = {"model": ModelOptions, "tokens": TokenOptions}.get(group, TrainConfig)
    for field in dataclasses.fields(kind):
        if field.name == name and field.default is not dataclasses.MISSING:
            return field.default
    return None
