"""Strict reading of a row's fields; each error names the row, the field, the rule and the cure."""

import math
from collections.abc import Iterable
from typing import Any

from raco_fast.dpo.data.rows import Row, is_number, shape, show

Turn = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names for a message, in order, each cut to 40 characters, no more than `limit` of them."""
    ordered = sorted(names)
    more = f", and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"[{', '.join(repr(name[:40]) for name in ordered[:limit])}{more}]"


def field(row: Row, name: str) -> Any:
    """A field that every row of the format has."""
    if name not in row.data:
        raise ValueError(
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


def as_turns(row: Row, name: str, value: object) -> list[Turn]:
    """A value that has to be a list of turns; only role and content of each are kept."""
    if not isinstance(value, list):
        raise row.error(
            name, "be a list of turns", shape(value), 'write [{"role": .., "content": ..}]'
        )
    turns = []
    for k, turn in enumerate(value):
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            found = listed(turn) if isinstance(turn, dict) else shape(turn)
            raise row.error(f"{name}[{k}]", "have a role and a content", found, "add them")
        turns.append({x: as_text(row, f"{name}[{k}].{x}", turn[x]) for x in ("role", "content")})
    return turns


def as_number(row: Row, name: str, value: object) -> float:
    """A rating or score: a finite number."""
    if not is_number(value) or not math.isfinite(value):
        raise row.error(
            name, "be a finite number for both responses", show(value), "write the rating"
        )
    return float(value)


def as_label(row: Row, name: str, value: object) -> int:
    """A label written as a number: +1, -1 or 0."""
    if not is_number(value) or value not in (-1, 0, 1):
        raise row.error(
            name, "be +1, -1 or 0", show(value), "an unknown label is never read as a tie"
        )
    return int(value)
