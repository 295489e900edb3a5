"""Plain values (of YAML, JSON or a command line) as the dataclasses that they are to fill.

What a field may hold is read from its type hint; a value of another kind is an error that names the
setting, not a conversion.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_YES_NO = {"yes": True, "on": True, "no": False, "off": False}
_LARGEST = 2**63


def typed(value: Any, hint: Any, name: str = "") -> Any:
    """`value` as `hint` asks for it.

    Args:
        value: None, bool, int, float, str, or a list or mapping of these.
        hint: a dataclass, or what the fields of one are annotated with.
        name: of the setting, for messages; empty for a whole config.
    Raises:
        ValueError: an unknown name or a missing one, another kind of value, a number that is not
            finite or beyond 2^63, text that is not UTF-8; or what the dataclass itself refuses.
    """
    members = members_of(hint)
    fitting = [member for member in members if _is_kind(value, member)]
    if not fitting:
        kinds = " or ".join(dict.fromkeys(_described(member) for member in members))
        raise ValueError(f"`{name}` must be {kinds}, got {shown(value)}; {_cure(value, members)}")
    return _filled(value, fitting[0], name)


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types that a union joins; of another hint, itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def fields_of(kind: Any) -> dict[str, Any]:
    """Field -> type hint of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def shown(value: Any) -> str:
    """A value in a message, in some dozens of characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def _is_kind(value: Any, hint: Any) -> bool:
    """Whether a value is of a kind that can be a `hint`; what it holds is looked at later."""
    if hint is Any:
        return True
    if hint is bool:
        return isinstance(value, bool) or (isinstance(value, str) and value.lower() in _YES_NO)
    if hint in (int, float):
        kinds = (int, float) if hint is float else (int,)
        return isinstance(value, kinds) and not isinstance(value, bool)
    origin = get_origin(hint) or hint
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in get_args(hint))
    if dataclasses.is_dataclass(origin):
        return isinstance(value, Mapping)
    if origin is tuple:
        return isinstance(value, (list, tuple))
    return isinstance(value, origin)


def _filled(value: Any, hint: Any, name: str) -> Any:
    if isinstance(value, str):
        _check_text(value, name)
        return _YES_NO[value.lower()] if hint is bool else value
    if isinstance(value, (int, float)):
        return _checked_number(value, name, float if hint is float else type(value))
    if dataclasses.is_dataclass(hint):
        return _dataclass(value, hint, name)
    of = get_args(hint)
    if isinstance(value, Mapping):
        inner = of[1] if of else Any
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"`{name}` must have texts as names, got {shown(key)}; quote it")
            _check_text(key, f"{name}.{key!a}")
        return {key: typed(each, inner, f"{name}.{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return _sequence(value, hint, name)
    return value


def _sequence(value: Any, hint: Any, name: str) -> Any:
    of = get_args(hint) or (Any,)
    each = [of[0]] * len(value)
    if get_origin(hint) is tuple and Ellipsis not in of:
        if len(value) != len(of):
            raise ValueError(f"`{name}` must hold {len(of)} values, got {shown(value)}; correct it")
        each = list(of)
    filled = [typed(v, h, f"{name}[{k}]") for k, (v, h) in enumerate(zip(value, each, strict=True))]
    return tuple(filled) if get_origin(hint) is tuple else filled


def _dataclass(value: Mapping[str, Any], kind: Any, name: str) -> Any:
    hints, prefix = fields_of(kind), f"{name}." if name else ""
    for key in value:
        if key not in hints:
            raise ValueError(
                f"`{prefix}{key}` is no setting, got {shown(value[key])} for it; "
                f"{did_you_mean(str(key), hints)}"
            )
    given = {key: typed(each, hints[key], prefix + key) for key, each in value.items()}
    for field in dataclasses.fields(kind):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in given:
            raise ValueError(f"`{prefix}{field.name}` must be given, got no value for it; add it")
    try:
        return kind(**given)
    except TypeError as error:  # of a value within, such as a rule's option of another kind
        raise ValueError(str(error)) from error


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
        wrong = "\0" in text
    except UnicodeEncodeError:
        wrong = True
    if wrong:
        raise ValueError(
            f"`{name}` must be UTF-8 text without NUL characters, got {shown(text)}; remove what "
            f"is none"
        )


def _checked_number(value: float, name: str, kind: type) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}; write a number")
    if abs(value) >= _LARGEST and isinstance(value, int):
        raise ValueError(f"`{name}` must be below 2^63, got {_short(value)}; write a smaller one")
    return kind(value)


def _short(value: int) -> str:
    return str(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"


def _described(hint: Any) -> str:
    named: dict[Any, str] = {
        str: "a text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        NoneType: "null",
    }
    if hint in named:
        return named[hint]
    if get_origin(hint) is Literal:
        return f"one of {sorted(get_args(hint))}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping of {', '.join(fields_of(hint))}"
    return "a list" if (get_origin(hint) or hint) in (list, tuple) else "a mapping"


def _cure(value: Any, members: tuple[Any, ...]) -> str:
    numbers = {int, float, bool} & set(members)
    if isinstance(value, str) and numbers and str not in members:
        return "write it without quotes" if value[:1].isdigit() else "correct it"
    if isinstance(value, (bool, int, float)) and str in members:
        return "put it in quotes"
    if isinstance(value, str):
        words = [w for h in members if get_origin(h) is Literal for w in get_args(h)]
        near = difflib.get_close_matches(value, words, 1)
        return f"did you mean {near[0]!r}?" if near else "correct it"
    return "leave it out for its default" if value is None else "correct it"
