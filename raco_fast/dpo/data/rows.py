"""A row of a data file with the place it came from, and the error of a row that cannot be used.

What is wrong with one row is a `RowError`, and reading goes on behind it; all else is an error of
the file. Messages never quote prompts or responses, which may be private or harmful; they give
lengths.
"""

from dataclasses import dataclass, field
from typing import Any

from raco_fast.dpo.data.field_use import FieldUse


class RowError(ValueError):
    """What is wrong with one row, which `on_bad="skip"` leaves out."""


@dataclass(frozen=True)
class Row:
    """One row and its place.

    Attributes:
        where: "file:line", with the item's number added for a JSON list.
        number: 1-based number of the row in its file.
        data: the JSON object.
        use: which fields of the file were used.
        sides: which two of the row's answers are a pair, counted from 0, where it has several.
    """

    where: str
    number: int
    data: dict[str, Any]
    use: FieldUse = field(default_factory=FieldUse, compare=False, repr=False)
    sides: tuple[int, int] | None = None

    def error(self, field: str, rule: str, found: str, cure: str) -> RowError:
        """The error for a field that breaks a rule; `found` is made with `show` or `shape`."""
        return RowError(f"{self.where}: `{field}` must {rule}, got {found}; {cure}")
