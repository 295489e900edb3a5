"""`qa-feedback`: question, "prediction 1" to "prediction 4", and preference, a list of six.

Its numbers compare predictions (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4): 1 where the first is
better, 2 where the second is, 0 for a tie. FineGrainedRLHF's form (arXiv 2306.01693); its passages
are no part of the prompt.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations

from raco_fast.dpo.data.formats.fields import as_choice, as_list, field, text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import shape

_PREDICTIONS = tuple(f"prediction {k}" for k in range(1, 5))
_PAIRS = tuple(combinations(range(len(_PREDICTIONS)), 2))


def _join(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        for a, b in _PAIRS:
            yield replace(row, where=f"{row.where} (answers {a + 1} and {b + 1})", sides=(a, b))


def _content(row: Row) -> Content:
    assert row.sides is not None
    a, b = (text(row, _PREDICTIONS[k]) for k in row.sides)
    return [{"role": "user", "content": text(row, "question")}], a, b


def _label(row: Row, name: str) -> float | None:
    if name != "preference":
        return None
    given = as_list(field(row, name))
    if given is None or len(given) != len(_PAIRS):
        rule, cure = f"be a list of {len(_PAIRS)}", "give a number for each two predictions"
        raise row.error(name, rule, shape(row.data[name]), cure)
    assert row.sides is not None
    k = _PAIRS.index(row.sides)
    value = None if given[k] == 0 and given[k] is not False else given[k]
    rule = "be 1 or 2, the number of the better one, or 0 for a tie"
    return as_choice(row, f"{name}[{k}]", value, (1, 2), rule)


FORMAT = Format(
    "qa-feedback",
    {"question", "preference", *_PREDICTIONS},
    _content,
    _label,
    only="preference",
    join=_join,
    label_fields=lambda row: ("preference",),
)
