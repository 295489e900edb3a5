"""NVIDIA's graded preferences between two responses, whose signs are opposite.

- `helpsteer2-preference`: prompt, response_1, response_2, preference_strength from -3 to 3;
  positive prefers response_2.
- `helpsteer3`: context (turns), response1, response2, overall_preference from -3 to 3; negative
  prefers response1.

In both, what is below 0 prefers the first response: each label is minus the field.
"""

from raco_fast.dpo.data.formats.fields import as_graded, field, text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.formats.helpsteer2 import prompt_turns
from raco_fast.dpo.data.formats.turns import as_turns
from raco_fast.dpo.data.rows import Row

_MOST = 3


def _first_is_better(row: Row, name: str, only: str) -> float | None:
    if name != only or name not in row.data:
        return None
    return 0.0 - as_graded(row, name, row.data[name], _MOST)  # never -0.0


def _of_helpsteer2(row: Row) -> Content:
    return prompt_turns(row), text(row, "response_1"), text(row, "response_2")


def _of_helpsteer3(row: Row) -> Content:
    context = as_turns(row, "context", field(row, "context"))
    return context, text(row, "response1"), text(row, "response2")


HELPSTEER2_PREFERENCE = Format(
    "helpsteer2-preference",
    {"prompt", "response_1", "response_2", "preference_strength"},
    _of_helpsteer2,
    lambda row, name: _first_is_better(row, name, "preference_strength"),
    only="preference_strength",
)
HELPSTEER3 = Format(
    "helpsteer3",
    {"context", "response1", "response2", "overall_preference"},
    _of_helpsteer3,
    lambda row, name: _first_is_better(row, name, "overall_preference"),
    only="overall_preference",
)
