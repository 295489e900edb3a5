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
        needs: fields that the first row of every file in this format has.
        content: row -> (prompt turns, response a, response b); checks types, not emptiness.
        label: (row, field name) -> a number, positive where that field prefers response a,
            negative for b, its size in the field's own unit; 0 for a tie or no label; None where
            the row has no such field. None for a format that carries no label field (response a is
            the preferred one).
        also: names of the fields of a file's first row -> whether a file that has all of `needs` is
            in this format.
        only: the field that labels the one objective of a format with one label; None where
            objectives are asked for by their names.
        join: rows of the file -> rows of pairs.
        label_fields: row -> the names that a label can be asked for by, for messages.
        is_label: (field name, value) -> whether the field is a label, of another run's objective if
            not of this one's; other fields that nothing reads are reported as not used.
        contradiction: row -> what in it speaks against its own labels; None where nothing does, or
            where what else it says cannot be read.
    """

    name: str
    needs: Set[str]
    content: Callable[[Row], Content]
    label: Callable[[Row, str], float | None] | None = None
    also: Callable[[Set[str]], bool] = lambda names: True
    only: str | None = None
    join: Callable[[Iterable[Row]], Iterator[Row]] = iter
    label_fields: Callable[[Row], Iterable[str]] = lambda row: row.data
    is_label: Callable[[str, Any], bool] = lambda name, value: False
    contradiction: Callable[[Row], str | None] = lambda row: None

    def fits(self, names: Set[str]) -> bool:
        """Whether a file whose first row has fields of these names is in this format."""
        return self.needs <= names and self.also(names)

    def fields(self, row: Row) -> str:
        """The fields a label could be in, for messages."""
        return listed(self.label_fields(row))
