"""`helpsteer2`: prompt, response and numeric ratings; two consecutive rows share a prompt.

The label of an objective is the sign of the difference of its ratings.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from raco_fast.dpo.data.formats.context import CONTEXT_FIELDS
from raco_fast.dpo.data.formats.fields import as_number, as_text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row

_RATINGS = {"helpfulness", "correctness", "coherence", "complexity", "verbosity"}
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _shared(row: Row) -> dict[str, Any]:
    """What two rows of a pair have in common."""
    return {name: row.data[name] for name in ("prompt", *CONTEXT_FIELDS) if name in row.data}


def _join(rows: Iterable[Row]) -> Iterator[Row]:
    """Join each run of rows with one prompt; a run of other than two is left for `_content`."""
    for shared, group in groupby(rows, key=_shared):
        run = list(group)
        responses = [row.data.get("response") for row in run]
        data = {"responses": responses, "ratings_a": run[0].data, "ratings_b": run[-1].data}
        yield Row(run[0].where, run[0].number, shared | data, run[0].use)


def _content(row: Row) -> Content:
    responses = row.data["responses"]
    if len(responses) != 2:
        raise row.error(
            "prompt",
            "be shared by exactly two consecutive rows",
            f"{len(responses)}",
            "which responses to compare is ambiguous: pair them before, or set on_bad to 'skip'",
        )
    pieces = _TURN.split(as_text(row, "prompt", row.data.get("prompt")))
    roles = ["user", *(who.lower() for who in pieces[1::2])]
    prompt = [{"role": r, "content": c} for r, c in zip(roles, pieces[::2], strict=True)]
    return prompt, as_text(row, "response", responses[0]), as_text(row, "response", responses[1])


def _label(row: Row, objective: str) -> int | None:
    sides = (row.data["ratings_a"], row.data["ratings_b"])
    if not any(objective in side for side in sides):
        return None
    a, b = (as_number(row, objective, side.get(objective)) for side in sides)
    return (a > b) - (a < b)


FORMAT = Format(
    "helpsteer2",
    lambda names: {"prompt", "response"} <= names and bool(names & _RATINGS),
    _content,
    _label,
    _join,
    label_fields=lambda row: row.data["ratings_a"].keys() - {"prompt", "response"},
    is_label=lambda name, value: name in _RATINGS,
)
