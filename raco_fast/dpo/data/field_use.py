"""Which fields of a file's rows and turns were used, so that a run can say what was not."""

from collections import Counter
from collections.abc import Mapping
from typing import Any


class FieldUse:
    """What is known of one file's fields.

    Attributes:
        read: fields of rows that something asked for the value of.
        rows_with: field -> rows in which it says something.
        turns_with: field of turns that is not used -> turns in which it says something.
    """

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.rows_with: Counter[str] = Counter()
        self.turns_with: Counter[str] = Counter()

    def unused(self) -> str:
        """What was not used, by name and number, for a message; empty where all of it was."""
        columns = {name: n for name, n in self.rows_with.items() if name not in self.read}
        parts = []
        if columns:
            parts.append(f"columns {_counted(columns)}")
        if self.turns_with:
            parts.append(f"fields of turns {_counted(self.turns_with)}")
        return "; ".join(parts)


class Fields(dict[str, Any]):
    """The fields of a row; notes which of them are read."""

    def __init__(self, values: Mapping[str, Any], use: FieldUse) -> None:
        super().__init__(values)
        self._use = use

    def __getitem__(self, name: str) -> Any:
        self._use.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        self._use.read.add(name)
        return super().get(name, default)


def _counted(counts: Mapping[str, int], limit: int = 12) -> str:
    """Names with their counts, in order, each cut to 40 characters, no more than `limit`."""
    named = [f"{name[:40]!r} ({n})" for name, n in sorted(counts.items())]
    more = f" and {len(named) - limit} more" if len(named) > limit else ""
    return ", ".join(named[:limit]) + more
