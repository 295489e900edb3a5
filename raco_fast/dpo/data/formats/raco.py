"""`raco`, our own: prompt (turns), response_a, response_b, preferences {objective: +1, -1, 0}."""

from typing import Any

from raco_fast.dpo.data.formats.cells import spelled
from raco_fast.dpo.data.formats.fields import as_label, field
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.formats.turns import as_answer, as_turns
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import shape


def _content(row: Row) -> Content:
    a, b = (as_answer(row, name, field(row, name)) for name in ("response_a", "response_b"))
    return as_turns(row, "prompt", field(row, "prompt")), a, b


def _preferences(row: Row) -> dict[str, Any]:
    preferences = spelled(field(row, "preferences"))
    if not isinstance(preferences, dict):
        raise row.error(
            "preferences", "map objectives to labels", shape(preferences), "write an object"
        )
    return preferences


def _label(row: Row, objective: str) -> int | None:
    preferences = _preferences(row)
    if objective not in preferences:
        return None
    given = preferences[objective]
    if given is None:  # tables have every objective in both objects, with null in one of them
        soft = spelled(row.data.get("preference_probabilities"))
        if isinstance(soft, dict) and soft.get(objective) is not None:
            return None
    return as_label(row, f"preferences.{objective}", given)


FORMAT = Format(
    "raco",
    {"response_a", "response_b", "preferences"},
    _content,
    _label,
    label_fields=_preferences,
)
