"""`config.yaml --lr 2e-5 --model.lora.r 8 --resume`: the settings of a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from raco_fast.settings.paths import expanded
from raco_fast.settings.text import parsed, read_file
from raco_fast.settings.typed import did_you_mean, fields_of, members_of, shown


class UsageError(ValueError):
    """Arguments that are no options of the command."""


def settings_of(
    arguments: Sequence[str], kind: type, flags: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, bool]]:
    """The plain settings of a command line for the dataclass `kind`, and which flags are set.

    Options come after the file's settings, wherever they stand, and replace them. A boolean needs
    no value: `--tensorboard`, `--no_tensorboard`. So does a flag.

    Args:
        arguments: after the command; a first one without `--` is the config file, as `--config`.
        flags: names of options that are no settings.
    Raises:
        UsageError: an unknown option, or one without its value.
        OSError, ValueError: the config cannot be read, or a value not understood.
    """
    left, files, given = list(arguments), [], []
    if left and not left[0].startswith("-"):
        left.insert(0, "--config")
    hints = {**dict.fromkeys(flags, bool), **fields_of(kind)}
    while left:
        name, value = _next_option(left, hints)
        if name == "config":
            files.append(value)
        else:
            given.append((name, value))
    if len(files) > 1:
        raise UsageError(f"--config must be given once, got {files}; join the files")
    settings = read_file(expanded(files[0], "config")) if files else {}
    chosen = dict.fromkeys(flags, False)
    for name, value in given:
        if name in chosen:
            chosen[name] = value
        else:
            _set(settings, name.split("."), value, name)
    return settings, chosen


def _next_option(left: list[str], hints: dict[str, Any]) -> tuple[str, Any]:
    """(name, value) of the first option of `left`, which is taken off."""
    option, equals, text = left.pop(0).partition("=")
    if not option.startswith("--") or option == "--":
        raise UsageError(f"options must begin with '--', got {option!r}; correct it")
    name = option[2:]
    if name == "config":
        return name, text if equals else _value_after(option, left)
    hint = _hint(name.removeprefix("no_") if _negates(name, hints) else name, hints, option)
    if hint is bool and not equals:
        if _negates(name, hints):
            return name.removeprefix("no_"), False
        following = left[0] if left else ""
        if following.lower() not in ("true", "false", "yes", "no", "on", "off"):
            return name, True
    if not equals:
        text = _value_after(option, left)
    value = _value(text, hint, f"`{option}`")
    if hint is bool and isinstance(value, str):
        value = {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value)
    if hint is bool and not isinstance(value, bool):
        raise UsageError(f"{option} must be true or false, got {text!r}; correct it")
    return name, value


def _negates(name: str, hints: dict[str, Any]) -> bool:
    return name.startswith("no_") and hints.get(name.removeprefix("no_")) is bool


def _value_after(option: str, left: list[str]) -> str:
    if not left or left[0].startswith("--"):
        raise UsageError(f"{option} must have a value after it, got none; add one")
    return left.pop(0)


def _hint(name: str, hints: dict[str, Any], option: str) -> Any:
    """The type hint of a setting that is named with dots."""
    parts, path = name.split("."), ""
    hint: Any = None
    for part in parts:
        if part not in hints and "*" not in hints:
            raise UsageError(
                f"{option} is no option, got {path + part!r}; {did_you_mean(part, hints)}"
            )
        hint = hints.get(part, hints.get("*"))
        hints, path = _within(hint), f"{path}{part}."
    return hint


def _within(hint: Any) -> dict[str, Any]:
    """Name -> hint of what a value holds; "*" stands for any name."""
    for member in members_of(hint):
        if dataclasses.is_dataclass(member):
            return fields_of(member)
        if get_origin(member) is dict:
            return {"*": get_args(member)[1]}
    return {}


def _value(text: str, hint: Any, where: str) -> Any:
    """The value that an option's text stands for; text itself where a setting holds text."""
    members = members_of(hint)
    plain = str in members and not {int, float, bool} & set(members)
    nested = text.lstrip().startswith(("{", "[")) and len(members) > 1
    if plain and not nested:
        return None if text == "null" and type(None) in members else text
    return parsed(text, where)


def _set(settings: dict[str, Any], path: Sequence[str], value: Any, name: str) -> None:
    for part in path[:-1]:
        inner = settings.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise UsageError(
                f"--{name} is a part of `{part}`, which is {shown(inner)}; give `{part}` as a "
                f"mapping"
            )
        settings[part] = inner = dict(inner or {})
        settings = inner
    settings[path[-1]] = value
