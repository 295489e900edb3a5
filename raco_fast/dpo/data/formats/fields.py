"""Strict reading of a row's fields; each error names the row, the field, the rule and the cure."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from raco_fast.dpo.data.formats.cells import spelled
from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.dpo.data.strict_json import decode
from raco_fast.dpo.data.values import is_number, shape, show

_NUMBER = re.compile(r"[+-]?\d{1,12}(\.\d{1,12})?")


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
    return str(value)


def as_object(row: Row, name: str, value: object) -> dict[str, Any]:
    """A value that has to be an object."""
    value = spelled(value)
    if not isinstance(value, dict):
        raise row.error(name, "be an object", shape(value), "write an object")
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
    return [as_object(row, f"{name}[{k}]", item) for k, item in enumerate(objects)]


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


def as_rating(row: Row, name: str, value: object) -> float | None:
    """A rating that may be missing: a finite number, or None where it is null."""
    return None if value is None else as_number(row, name, value)


def as_spelled_rating(row: Row, name: str, value: object) -> float | None:
    """A rating that is a number or a text that spells one, as some data sets have them.

    Texts are compared as the numbers they spell: as texts, "10" would be below "9".
    """
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise row.error(
                name, "be a number, or text that spells one", show(value), "write the rating"
            )
        value = float(value)
    return as_rating(row, name, value)


def above(a: float | None, b: float | None) -> float:
    """By how much a rating is above another; 0, which is no label, where one is missing."""
    return 0.0 if a is None or b is None else a - b


def as_list(value: object) -> list[Any] | None:
    """A list, or the one that a cell spells; None of any other value."""
    value = spelled(value)
    return value if isinstance(value, list) else None


def as_float(value: object) -> float:
    """A number as float64, NaN where it is none; whole numbers of a file are never too large."""
    value = spelled(value)
    return float(value) if is_number(value) else math.nan


def as_label(row: Row, name: str, value: object) -> int:
    """A label written as a number: +1, -1 or 0; null is 0, not labelled."""
    value = spelled(value)
    if value is None:
        return 0
    if not is_number(value) or value not in (-1, 0, 1):
        cure = "an unknown label is never read as a tie"
        if is_number(value) and -1 < value < 1:
            cure = "how sure a label is belongs in `preference_probabilities`"
        raise row.error(name, "be +1, -1 or 0", show(value), cure)
    return int(value)


def as_choice(row: Row, name: str, value: object, choices: Sequence[object], rule: str) -> int:
    """A label that names the better response: +1 for the first choice, -1 for the second.

    Null is 0, not labelled. Of choices that are numbers, true and false are none.
    """
    if not isinstance(choices[0], str):
        value = spelled(value)
    if value is None:
        return 0
    for choice, label in zip(choices, (1, -1), strict=True):
        if value == choice and not isinstance(value, bool):
            return label
    raise row.error(name, rule, show(value), "an unknown label is never read as a tie")


def as_graded(row: Row, name: str, value: object, most: int) -> float:
    """A graded label: a whole number from -most to most; null is 0, not labelled."""
    value = spelled(value)
    if value is None:
        return 0.0
    if not is_number(value) or value not in range(-most, most + 1):
        rule = f"be a whole number from -{most} to {most}"
        raise row.error(name, rule, show(value), "an unknown label is never read as a tie")
    return float(value)
