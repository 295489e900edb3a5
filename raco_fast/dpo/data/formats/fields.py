"""Strict reading of a row's fields; each error names the row, the field, the rule and the cure."""

import json
import math
from collections.abc import Iterable
from typing import Any, cast

from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.dpo.data.strict_json import decode
from raco_fast.dpo.data.values import is_number, shape, show


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names for a message, in order, each cut to 40 characters, no more than `limit` of them."""
    ordered = sorted(names)
    more = f", and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"[{', '.join(repr(name[:40]) for name in ordered[:limit])}{more}]"


def field(row: Row, name: str) -> Any:
    """A field that every row of the format has."""
    if name not in row.data:
        raise RowError(
            f"{row.where}: `{name}` must be present, got the fields {listed(row.data)}; "
            "every row of a file has the fields of its format"
        )
    return row.data[name]


def text(row: Row, name: str) -> str:
    """A field that holds text."""
    return as_text(row, name, field(row, name))


def as_text(row: Row, name: str, value: object) -> str:
    """A value that has to be text; `name` says in messages where it stands."""
    if not isinstance(value, str):
        raise row.error(name, "be text", shape(value), "write a string")
    return value


def as_objects(row: Row, name: str, value: object) -> list[dict[str, Any]]:
    """A value that has to be a list of objects; the list, or each of them, may be JSON in a text.

    Tables with a column for it, as datasets of the Hugging Face hub are, have it as text: schemas
    of several functions have no common type.
    """
    value = unpacked(row, name, value)
    if value is None:
        return []
    if not isinstance(value, list):
        raise row.error(name, "be a list of objects", shape(value), "write a list, or its JSON")
    objects = [unpacked(row, f"{name}[{k}]", item) for k, item in enumerate(value)]
    for k, item in enumerate(objects):
        if not isinstance(item, dict):
            raise row.error(f"{name}[{k}]", "be an object", shape(item), "write an object")
    return cast(list[dict[str, Any]], objects)


def unpacked(row: Row, name: str, value: object) -> object:
    """The value that a text spells as JSON; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        inner, fault = decode(value)
    except json.JSONDecodeError as error:
        found = f"{shape(value)} with an error at character {error.pos + 1} ({error.msg})"
        rule = "be complete JSON where it is text"
        raise row.error(name, rule, found, "write it again") from error
    if fault is not None:
        raise row.error(name, fault.rule, fault.found, fault.cure)
    return inner


def as_number(row: Row, name: str, value: object) -> float:
    """A rating or score: a finite number."""
    number = as_float(value)
    if not math.isfinite(number):
        raise row.error(
            name, "be a finite number for both responses", show(value), "write the rating"
        )
    return number


def as_float(value: object) -> float:
    """A number as float64, NaN where it is none; whole numbers of a file are never too large."""
    return float(value) if is_number(value) else math.nan


def as_label(row: Row, name: str, value: object) -> int:
    """A label written as a number: +1, -1 or 0."""
    if not is_number(value) or value not in (-1, 0, 1):
        raise row.error(
            name, "be +1, -1 or 0", show(value), "an unknown label is never read as a tie"
        )
    return int(value)
