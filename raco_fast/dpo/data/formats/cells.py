"""What a cell of a table of texts spells, where something else than text is asked for."""

import json
import re
from typing import Any

from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.strict_json import decode
from raco_fast.dpo.data.values import Cell

_PYTHON = re.compile(r"""\s*(\[\s*)?\{\s*'""")


def spelled(value: object) -> Any:
    """The value that a cell spells as JSON does; the cell where it spells none; any other value.

    A number may have a plus sign, as labels are often written.
    """
    if not isinstance(value, Cell):
        return value
    try:
        inner, fault = decode(value.removeprefix("+"))
    except json.JSONDecodeError:
        return value
    return value if fault is not None else inner


def said(row: Row, name: str, value: object) -> Any:
    """Turns that a cell spells, where it does; any other value, a text most of all, as it is.

    Raises:
        RowError: the cell holds turns as Python writes them: read as a text, they would be trained
            as one.
    """
    if not isinstance(value, Cell):
        return value
    if _PYTHON.match(value):
        rule, cure = "be text, or turns in JSON", "write the column with json.dumps"
        raise row.error(name, rule, "turns as Python writes them", cure)
    inner = spelled(value)
    (first,) = inner[:1] if isinstance(inner, list) and inner else (inner,)
    return inner if isinstance(first, dict) and "role" in first else value
