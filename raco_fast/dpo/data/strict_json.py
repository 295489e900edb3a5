"""JSON as data files hold it, read so that nothing is lost and nothing fails later.

Python's decoder keeps the last of two equal keys, makes half a character of a lone surrogate (which
no tokenizer can encode), reads whole numbers that no float64 holds, fails at longer ones without
saying where, and ends in a RecursionError where values are nested deeply. Here each of them is a
fault of the value, and the reader knows where the value ends and can go on behind it.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from raco_fast.dpo.data.values import show

MAX_DEPTH = 100
"""Lists and objects in one another: comparing and writing values recurses as deep as they go."""

MAX_DIGITS = 300
"""Of a whole number; all of them are finite in float64."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a value that is JSON.

    Attributes:
        field: the field of the outermost object that has the fault; None for the object itself.
        rule, found, cure: the parts of a message.
    """

    field: str | None
    rule: str
    found: str
    cure: str


class _Repeating(dict[str, Any]):
    """An object that had a key twice."""

    repeated: str = ""


@dataclass(frozen=True)
class _LongNumber:
    """In place of a whole number of too many digits."""

    digits: int


def decode(text: str) -> tuple[Any, Fault | None]:
    """The one value of a text, and what is wrong with it.

    Raises:
        json.JSONDecodeError: the text is not one JSON value.
    """
    value, end, fault = decode_at(text, skip_space(text, 0))
    end = skip_space(text, end)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value, fault


def decode_at(text: str, at: int) -> tuple[Any, int, Fault | None]:
    """The value that begins at a position, the position behind it, and what is wrong with it.

    Raises:
        json.JSONDecodeError: no JSON value begins there, or its end cannot be found.
    """
    try:
        value, end = _JSON.raw_decode(text, at)
    except RecursionError as error:
        raise json.JSONDecodeError("Lists or objects nested too deeply", text, at) from error
    return value, end, _fault_of(value)


def skip_space(text: str, at: int) -> int:
    """The position of the next character that is not JSON's white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    repeating = _Repeating(values)
    keys = [key for key, _ in pairs]
    repeating.repeated = next(key for k, key in enumerate(keys) if key in keys[:k])
    return repeating


def _integer(digits: str) -> int | _LongNumber:
    length = len(digits.lstrip("-"))
    return int(digits) if length <= MAX_DIGITS else _LongNumber(length)


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _fault_of(value: Any) -> Fault | None:
    """The first fault found; without recursion, which is what it has to prevent.

    Tuples (field, value, depth) wait to be looked at.
    """
    waiting: list[tuple[str | None, Any, int]] = [(None, value, 0)]
    while waiting:
        field, value, depth = waiting.pop()
        fault = _own_fault(field, value, depth)
        if fault is not None:
            return fault
        if isinstance(value, dict):
            for key, part in value.items():
                inside = key if depth == 0 else field
                waiting += ((inside, x, depth + 1) for x in (key, part) if not _is_plain(x))
        elif isinstance(value, list):
            waiting += ((field, part, depth + 1) for part in value if not _is_plain(part))
    return None


def _is_plain(value: Any) -> bool:
    """Whether a value is a text that cannot have a fault, as most are."""
    return isinstance(value, str) and value.isascii()


def _own_fault(field: str | None, value: Any, depth: int) -> Fault | None:
    """What is wrong with a value, apart from what it holds."""
    if isinstance(value, str):
        if not _SURROGATE.search(value):
            return None
        rule, found = "hold whole characters", r"half a surrogate pair (\ud800 to \udfff alone)"
        return Fault(field, rule, found, "a text was cut inside a character, write it again")
    if isinstance(value, _LongNumber):
        rule, found = f"hold numbers of at most {MAX_DIGITS} digits", f"one of {value.digits}"
        return Fault(field, rule, found, "correct the number")
    if isinstance(value, _Repeating):
        rule, found = "have every key once in an object", f"{show(value.repeated)} again"
        return Fault(field, rule, found, "only one of them could be read: rename or remove one")
    if isinstance(value, (list, dict)) and depth >= MAX_DEPTH:
        rule = f"hold at most {MAX_DEPTH} lists and objects inside one another"
        return Fault(field, rule, "more", "make the value flatter")
    return None
