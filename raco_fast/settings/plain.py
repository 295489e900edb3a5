"""Plain values (None, numbers, texts, lists and mappings of them) that settings may hold."""

from __future__ import annotations

import dataclasses
import math
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def check(value: Any, name: str = "", hint: Any = Any) -> None:
    """Raise unless a plain value is one that jsonargparse and a run can work with.

    What kind of value `hint` asks for is left to jsonargparse, but for null, which it lets pass.

    Args:
        name: of the setting, for messages; empty for a whole config.
        hint: a dataclass, or what the fields of one are annotated with.
    Raises:
        ValueError: a number that is not finite or beyond 2^63, text that is not UTF-8 or has a
            NUL, null where a value must be, or a `class_path`, which would make any object.
    """
    members = members_of(hint)
    if isinstance(value, dict):
        hints = {
            n: h for m in members if dataclasses.is_dataclass(m) for n, h in fields_of(m).items()
        }
        for key, each in value.items():
            path = f"{name}.{key}" if name else str(key)
            check(key, ascii(path))
            if key == "class_path":
                raise ValueError(f"`{path}` is no setting, got {shown(each)} for it; remove it")
            check(each, path, hints.get(key, Any))
    elif isinstance(value, (list, tuple)):
        (of, *_) = [*(h for m in members for h in get_args(m)), Any]
        for k, each in enumerate(value):
            check(each, f"{name}[{k}]", of)
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value):
            rule = "must be UTF-8 text without NUL characters"
            raise ValueError(f"`{name}` {rule}, got {shown(value)}; remove what is none")
    elif value is None and not {Any, NoneType} & {*members}:
        raise ValueError(f"`{name}` must have a value, got null; leave it out for its default")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}; write a number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"`{name}` must be below 2^63, got {shown(value)}; write a smaller one")


def shown(value: Any) -> str:
    """A value in a message, in some dozens of characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types that a union joins; of another hint, itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def fields_of(kind: Any) -> dict[str, Any]:
    """Field -> type hint of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
