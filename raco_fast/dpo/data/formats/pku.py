"""`pku` (BeaverTails, SafeRLHF): prompt, response_0, response_1 and, each 0 or 1,
better_response_id and safer_response_id, which objectives also know as helpful and harmless.
"""

from raco_fast.dpo.data.formats.conversation import prompt_turns
from raco_fast.dpo.data.formats.fields import text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import show

_FIELDS = {"helpful": "better_response_id", "harmless": "safer_response_id"}


def _content(row: Row) -> Content:
    a, b = text(row, "response_0"), text(row, "response_1")
    return prompt_turns(row), a, b


def _label(row: Row, objective: str) -> int | None:
    name = objective if objective in row.data else _FIELDS.get(objective)
    if name is None or name not in row.data:
        return None
    value = row.data[name]
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise row.error(
            name, "be 0 or 1", show(value), "it names the preferred response by its number"
        )
    return 1 if value == 0 else -1


FORMAT = Format(
    "pku",
    lambda names: {"response_0", "response_1"} <= names and bool(names & set(_FIELDS.values())),
    _content,
    _label,
    is_label=lambda name, value: name in _FIELDS.values(),
)
