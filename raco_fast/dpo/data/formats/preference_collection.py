"""`preference-collection`: orig_instruction, orig_response_A and _B, orig_preference "A" or "B".

Each row was judged by a criterion of its own (orig_criteria), so the label is one objective's, that
of being preferred by the row's criterion. `orig_score` is the difference of the scores, which are
texts.
"""

from raco_fast.dpo.data.formats.fields import above, as_choice, as_spelled_rating, text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row, RowError

_PREFERENCE = "orig_preference"
_SCORES = ("orig_score_A", "orig_score_B")


def _content(row: Row) -> Content:
    prompt = [{"role": "user", "content": text(row, "orig_instruction")}]
    return prompt, text(row, "orig_response_A"), text(row, "orig_response_B")


def _label(row: Row, name: str) -> float | None:
    if name == "orig_score" and set(_SCORES) <= row.data.keys():
        return _score(row)
    if name != _PREFERENCE or name not in row.data:
        return None
    return as_choice(row, name, row.data[name], ("A", "B"), "be 'A' or 'B'")


def _score(row: Row) -> float:
    return above(*(as_spelled_rating(row, name, row.data[name]) for name in _SCORES))


def _contradiction(row: Row) -> str | None:
    if not set(_SCORES) <= row.data.keys():
        return None
    worse = {"A": -1.0, "B": 1.0}.get(str(row.data.get(_PREFERENCE)), 0.0)
    try:
        lower = worse * _score(row) > 0
    except RowError:  # scores that no objective asks for may be anything
        return None
    return "the preferred response has the lower score" if lower else None


FORMAT = Format(
    "preference-collection",
    {"orig_instruction", "orig_response_A", "orig_response_B", _PREFERENCE},
    _content,
    _label,
    only=_PREFERENCE,
    label_fields=lambda row: (_PREFERENCE, "orig_score"),
    is_label=lambda name, value: name in (_PREFERENCE, *_SCORES),
    contradiction=_contradiction,
)
