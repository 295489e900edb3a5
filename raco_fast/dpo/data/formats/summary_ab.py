"""`summary-ab`: Summary_A, Summary_B (turns) and for each objective a field, "A" or "B"."""

from raco_fast.dpo.data.formats.conversation import two_sides
from raco_fast.dpo.data.formats.fields import as_choice
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.rows import Row


def _label(row: Row, objective: str) -> int | None:
    """By the field of that name; upper and lower case matter only where two names fit."""
    alike = [name for name in row.data if name.casefold() == objective.casefold()]
    name = objective if objective in row.data else alike[0] if len(alike) == 1 else None
    if name is None:
        return None
    return as_choice(row, name, row.data[name], ("A", "B"), "be 'A' or 'B'")


FORMAT = Format(
    "summary-ab",
    {"Summary_A", "Summary_B"},
    lambda row: two_sides(row, "Summary_A", "Summary_B"),
    _label,
    is_label=lambda name, value: value in ("A", "B"),
)
