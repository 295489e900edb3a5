"""YAML and JSON as plain values, with the surprises taken out.

A name is the text that is written: `no:`, `1:` and `null:` are the names "no", "1" and "null",
which YAML 1.1 makes a boolean, a number and nothing of. So are the words yes, no, on and off as
values (YAML 1.2). `1e-5` is a number. A name that is given twice is an error, and so is a tag: text
makes no objects. Aliases and merges (`<<`) are followed as far as the limits below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml import events

MOST_BYTES = 1 << 20
MOST_VALUES = 50_000
DEEPEST = 40

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_HEXADECIMAL = re.compile(r"[-+]?0(x[0-9a-fA-F]+|o[0-7]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{
        sign + word: float(sign + "inf")
        for sign in ("", "+", "-")
        for word in (".inf", ".Inf", ".INF")
    },
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def read_file(path: Path, name: str = "config") -> dict[str, Any]:
    """The settings in a YAML or JSON file: a mapping of plain values.

    Args:
        name: of what is read, for messages.
    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: it is too large, no UTF-8, no YAML or JSON, no mapping or an empty one; or a
            name is given twice. Names the file and the line.
    """
    if path.is_dir() or not path.exists():
        kind = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"`{name}` must be a file, got {path}, which is {kind}; check it")
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ValueError(
            f"{path}: a config must have at most {MOST_BYTES} bytes, got more; is this the data?"
        )
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: text must be UTF-8, got byte 0x{raw[error.start]:02x}; "
            f"convert the file"
        ) from error
    value = parsed(text, str(path))
    if not isinstance(value, dict) or not value:
        found = "nothing" if value is None or value == {} else f"a {type(value).__name__}"
        raise ValueError(
            f"{path}: a config must be a mapping `name: value`, got {found}; see README.md for one"
        )
    return value


def parsed(text: str, where: str) -> Any:
    """The value that YAML or JSON text stands for; None for an empty text.

    Args:
        where: file or argument, which messages begin with, the line added.
    Raises:
        ValueError: as `read_file`.
    """
    if text.lstrip().startswith(("{", "[")):
        try:
            return _json(text, where)
        except json.JSONDecodeError:
            pass  # YAML has braces and brackets too
    return _Reader(text, where).document()


def _json(text: str, where: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _Refused(f"{where}: {_twice(key)}")
            found[key] = value
        return found

    def integer(digits: str) -> int:
        return _integer(digits, 10, where)

    try:
        value = json.loads(text, object_pairs_hook=mapping, parse_int=integer)
    except RecursionError:
        raise ValueError(f"{where}: {_too_deep()}") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    _check_size(value, where)
    return value


class _Refused(Exception):  # noqa: N818 - only on the way out of json's hooks
    """What is wrong with JSON that can be read."""


def _check_size(value: Any, where: str) -> None:
    count, level = 0, [value]
    for _ in range(DEEPEST):
        inner = [x for x in level if isinstance(x, (dict, list))]
        level = [y for x in inner for y in (x.values() if isinstance(x, dict) else x)]
        count += len(level)
        if not level:
            break
    else:
        raise ValueError(f"{where}: {_too_deep()}")
    if count > MOST_VALUES:
        raise ValueError(f"{where}: {_too_many()}")


def _integer(digits: str, base: int, where: str) -> int:
    try:
        return int(digits, base)
    except ValueError:  # Python reads no numbers of thousands of digits
        raise ValueError(
            f"{where}: a number must have at most some hundred digits, got "
            f"{len(digits)}; is it one?"
        ) from None


def _twice(key: str) -> str:
    return f"a name must be given once, got {key!r} twice; remove one"


def _too_deep() -> str:
    return f"values must be nested at most {DEEPEST} deep, got more; flatten them"


def _too_many() -> str:
    return f"a config must hold at most {MOST_VALUES} values, got more; are aliases repeated?"


class _Reader:
    """Builds plain values of the events of one YAML text."""

    def __init__(self, text: str, where: str) -> None:
        self._text, self._where, self._line = text, where, 1
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._count = 0
        self._events = self._read()

    def _read(self) -> Iterator[events.Event]:
        try:
            for event in yaml.parse(self._text, Loader=yaml.SafeLoader):
                if event.start_mark is not None:
                    self._line = event.start_mark.line + 1
                yield event
        except yaml.MarkedYAMLError as error:
            if mark := error.problem_mark or error.context_mark:
                self._line = mark.line + 1
            self._refuse(f"text must be YAML, got {error.problem or error.context}; correct it")
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # A character that YAML does not allow, or an escape that stands for none.
            reason = " ".join(str(error).split())
            self._refuse(f"text must be YAML, got {reason}; correct it")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self._where}:{self._line}: {what}")

    def document(self) -> Any:
        """The value of the only document; None where there is none."""
        next(self._events)  # the stream's start
        event, value = next(self._events), None
        if isinstance(event, events.DocumentStartEvent):
            value = self._value(next(self._events), 0)
            next(self._events)
            event = next(self._events)
        if not isinstance(event, events.StreamEndEvent):
            self._refuse("a config must be one YAML document, got a second one; remove it")
        return value

    def _value(self, event: events.Event, depth: int) -> Any:
        if isinstance(event, events.AliasEvent):
            return self._of_alias(event.anchor)
        if depth > DEEPEST:
            self._refuse(_too_deep())
        self._counted(1)
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        if tag not in (None, "!", "tag:yaml.org,2002:str"):
            self._refuse(f"values must have no tag, got {tag!r}; remove it")
        before = self._count
        if anchor is not None:
            self._anchors.pop(anchor, None)  # until its value is whole it has none
        value: Any
        if isinstance(event, events.ScalarEvent):
            value = event.value if tag or not event.implicit[0] else self._plain(event.value)
        elif isinstance(event, events.SequenceStartEvent):
            value = []
            while not isinstance(event := next(self._events), events.SequenceEndEvent):
                value.append(self._value(event, depth + 1))
        else:
            value = self._mapping(depth)
        if anchor is not None:
            self._anchors[anchor] = value, 1 + self._count - before
        return value

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self._events), events.MappingEndEvent):
            line = self._line
            key = self._name(event)
            value = self._value(next(self._events), depth + 1)
            if key == "<<" and isinstance(event, events.ScalarEvent) and event.implicit[0]:
                for one in reversed(value if isinstance(value, list) else [value]):
                    if not isinstance(one, dict):
                        self._refuse(
                            "`<<` must be followed by mappings, got another value; correct it"
                        )
                    merged |= one
            elif key in found:
                self._line = line
                self._refuse(_twice(key))
            else:
                found[key] = value
        return {**merged, **found}

    def _name(self, event: events.Event) -> str:
        if isinstance(event, events.ScalarEvent):
            if event.anchor is not None:
                self._anchors[event.anchor] = event.value, 1
            return str(event.value)
        value = self._of_alias(event.anchor) if isinstance(event, events.AliasEvent) else None
        if not isinstance(value, str):
            self._refuse("a name must be a text, got a list or a mapping; correct it")
        return value

    def _of_alias(self, anchor: str | None) -> Any:
        if anchor is None or anchor not in self._anchors:
            self._refuse(
                f"`*{anchor}` must stand after the whole `&{anchor}`, got it before its "
                f"end; write the value out"
            )
        value, count = self._anchors[anchor]
        self._counted(count)
        return value

    def _counted(self, values: int) -> None:
        self._count += values
        if self._count > MOST_VALUES:
            self._refuse(_too_many())

    def _plain(self, text: str) -> Any:
        if text in _WORDS:
            return _WORDS[text]
        where = f"{self._where}:{self._line}"
        if _INTEGER.fullmatch(text):
            return _integer(text.replace("_", ""), 10, where)
        if _HEXADECIMAL.fullmatch(text):
            return _integer(text, 0, where)
        return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text
