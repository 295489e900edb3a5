"""`raco-s`: as `chosen-rejected`, with labels in fields raco_s_<objective>: +1, -1, 0."""

from raco_fast.dpo.data.formats import chosen_rejected
from raco_fast.dpo.data.formats.fields import as_label
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.rows import Row


def _label(row: Row, objective: str) -> int | None:
    name = f"raco_s_{objective.removeprefix('raco_s_')}"
    return as_label(row, name, row.data[name]) if name in row.data else None


FORMAT = Format(
    "raco-s",
    {"chosen", "rejected"},
    chosen_rejected.FORMAT.content,
    _label,
    also=lambda names: any(name.startswith("raco_s_") for name in names),
    is_label=lambda name, value: name.startswith("raco_s_"),
)
