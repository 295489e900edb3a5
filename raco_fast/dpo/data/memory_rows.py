"""Rows that a caller of `raco_fast.dpo.train` has in memory, read as those of a file are."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from raco_fast.dpo.data.field_use import FieldUse
from raco_fast.dpo.data.json_rows import checked_row
from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.dpo.data.strict_json import decode

if TYPE_CHECKING:
    from datasets import Dataset

    Rows: TypeAlias = Sequence[Mapping[str, Any]] | Dataset

MEMORY = "memory:"
"""What the path of a source, or the name of a model, begins with that is no file but an object."""


def is_data_set(given: object) -> TypeGuard[Dataset]:
    """Whether an object is a data set of the library `datasets`, which is not imported for it."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(given, datasets.Dataset)


def memory_rows(name: str, rows: Rows, use: FieldUse) -> Iterator[Row | RowError]:
    """Yield the rows in order; messages name them by their number, from 1.

    Each is written as JSON and read again, so that what is refused in a file is refused here, and
    nothing that is done with a row changes the caller's.

    Args:
        name: of the rows, for messages.
        use: notes which fields are read.
    """
    for number, given in enumerate(rows, start=1):
        yield _row(f"{name}:{number}", number, given, use)


def _row(where: str, number: int, given: object, use: FieldUse) -> Row | RowError:
    try:
        text = json.dumps(dict(given) if isinstance(given, Mapping) else given)
        value, fault = decode(text)
    except (TypeError, ValueError, RecursionError) as error:
        return RowError(
            f"{where}: a row must hold what JSON has (texts, numbers, true, false, null, lists and "
            f"objects of them), got a {_foreign(given)} ({type(error).__name__}); convert it"
        )
    return checked_row(where, number, value, fault, use)


def _foreign(given: object) -> str:
    """The kind of the first thing in a row that JSON does not have; its field, where it is in one.

    Never the thing itself, which may be text of the data.
    """
    plain = (str, int, float, bool, type(None), list, tuple, dict)
    if not isinstance(given, Mapping):
        return type(given).__name__
    for name, value in given.items():
        if not isinstance(value, plain):
            return f"{type(value).__name__} in `{ascii(name)[1:-1][:40]}`"
    return "value of another kind within a list or an object"
