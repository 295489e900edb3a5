"""What a format is: how its rows become a prompt, two responses and their labels."""

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

from raco_fast.dpo.data.formats.fields import listed
from raco_fast.dpo.data.formats.turns import Turn
from raco_fast.dpo.data.rows import Row

Content = tuple[list[Turn], str | Turn, str | Turn]
"""Prompt turns, response a, response b; a response is a text or an assistant turn."""


@dataclass(frozen=True)
class Format:
    """How one format is read.

    Args:
        name: what `DataSource.format` calls it.
        fits: names of the fields of a file's first row -> whether the file is in this format.
        content: row -> (prompt turns, response a, response b); checks types, not emptiness.
        label: (row, field name) -> +1, -1, 0, or None where the row has no such field; None for
            a format that carries no label field (response a is the preferred one).
        join: rows of the file -> rows of pairs.
        label_fields: row -> the names that a label can be asked for by, for messages.
        is_label: (field name, value) -> whether the field is a label, of another run's objective if
            not of this one's; other fields that nothing reads are reported as not used.
    """

    name: str
    fits: Callable[[Set[str]], bool]
    content: Callable[[Row], Content]
    label: Callable[[Row, str], int | None] | None = None
    join: Callable[[Iterable[Row]], Iterator[Row]] = iter
    label_fields: Callable[[Row], Iterable[str]] = lambda row: row.data
    is_label: Callable[[str, Any], bool] = lambda name, value: False

    def fields(self, row: Row) -> str:
        """The fields a label could be in, for messages."""
        return listed(self.label_fields(row))
