"""`pku` (SafeRLHF v0 to v2): prompt, response_0, response_1 and, each 0 or 1, better_response_id
and safer_response_id (or one of them), which objectives also know as helpful and harmless.

v2 has response_0_severity_level and response_1_severity_level besides: `severity_level` is a label
that prefers the less severe one.
"""

from raco_fast.dpo.data.formats.cells import spelled
from raco_fast.dpo.data.formats.conversation import prompt_turns
from raco_fast.dpo.data.formats.fields import above, as_choice, as_rating, text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import is_number

_FIELDS = {"helpful": "better_response_id", "harmless": "safer_response_id"}
_SEVERITIES = ("response_0_severity_level", "response_1_severity_level")


def _content(row: Row) -> Content:
    a, b = text(row, "response_0"), text(row, "response_1")
    return prompt_turns(row), a, b


def _label(row: Row, objective: str) -> float | None:
    if objective == "severity_level" and set(_SEVERITIES) <= row.data.keys():
        a, b = (as_rating(row, name, row.data[name]) for name in _SEVERITIES)
        return above(b, a)
    name = objective if objective in row.data else _FIELDS.get(objective)
    if name is None or name not in row.data:
        return None
    rule = "be 0 or 1, the number of the preferred response"
    return as_choice(row, name, row.data[name], (0, 1), rule)


def _contradiction(row: Row) -> str | None:
    """The safer response is said to be unsafe, and the other one safe; or it is more severe."""
    safer = spelled(row.data.get("safer_response_id"))
    if safer not in (0, 1):
        return None
    if [row.data.get(f"is_response_{k}_safe") for k in (safer, 1 - safer)] == [False, True]:
        return "`safer_response_id` names the response that is not safe"
    levels = [spelled(row.data.get(_SEVERITIES[k])) for k in (safer, 1 - safer)]
    if is_number(levels[0]) and is_number(levels[1]) and levels[0] > levels[1]:
        return "`safer_response_id` names the response of the higher severity level"
    return None


FORMAT = Format(
    "pku",
    {"response_0", "response_1"},
    _content,
    _label,
    also=lambda names: bool(names & set(_FIELDS.values())),
    label_fields=lambda row: {*_FIELDS, *_FIELDS.values(), "severity_level"},
    is_label=lambda name, value: name in (*_FIELDS.values(), *_SEVERITIES),
    contradiction=_contradiction,
)
