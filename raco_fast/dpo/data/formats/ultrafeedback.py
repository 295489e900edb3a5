"""`ultrafeedback`: instruction and four completions, each rated on four aspects from 1 to 5.

Each two completions are a pair, and each aspect a label. Ratings are texts ("1" to "5"), compared
as numbers; "N/A" is no label. `overall_score` is not read: it is wrong for hundreds of answers, 10
for bad ones. What each model was told before the instruction (`custom_system_prompt`) differs
between the two answers of a pair, so it is no part of the prompt.
"""

from typing import Any

from raco_fast.dpo.data.formats.answers import each_two, two_of
from raco_fast.dpo.data.formats.fields import above, as_object, as_spelled_rating, as_text, text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import shape

_NOT_RATED = "N/A"


def _content(row: Row) -> Content:
    a, b = (
        as_text(row, f"{at}.response", each.get("response"))
        for at, each in two_of(row, "completions")
    )
    return [{"role": "user", "content": text(row, "instruction")}], a, b


def _label(row: Row, name: str) -> float | None:
    both = _annotations(row)
    if not any(name in given for _, given in both):
        return None
    return above(*(_rating(row, f"{at}.{name}", given.get(name)) for at, given in both))


def _annotations(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """Aspect -> annotation of both completions, each with its place."""
    return [
        (f"{at}.annotations", as_object(row, f"{at}.annotations", each.get("annotations")))
        for at, each in two_of(row, "completions")
    ]


def _rating(row: Row, name: str, aspect: object) -> float | None:
    if not isinstance(aspect, dict) or "Rating" not in aspect:
        rule, cure = "hold a Rating for both responses", 'write "N/A" where there is none'
        raise row.error(name, rule, shape(aspect), cure)
    rating = aspect["Rating"]
    return None if rating == _NOT_RATED else as_spelled_rating(row, f"{name}.Rating", rating)


FORMAT = Format(
    "ultrafeedback",
    {"instruction", "completions"},
    _content,
    _label,
    join=each_two("completions"),
    label_fields=lambda row: {name for _, given in _annotations(row) for name in given},
)
