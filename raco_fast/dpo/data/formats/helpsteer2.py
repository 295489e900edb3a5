"""`helpsteer2`: prompt, response and numeric ratings; two consecutive rows share a prompt.

The label of an objective is the sign of the difference of its ratings. Of more rows with one
prompt each two that follow one another are a pair, as they are in the data set, where a prompt may
come twice.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from raco_fast.dpo.data.formats.context import CONTEXT_FIELDS
from raco_fast.dpo.data.formats.fields import above, as_rating, as_text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.formats.turns import Turn
from raco_fast.dpo.data.rows import Row

_RATINGS = {"helpfulness", "correctness", "coherence", "complexity", "verbosity"}
_MISSING = "nothing"  # of one response alone: no number, where null says that there is none
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _shared(row: Row) -> dict[str, Any]:
    """What two rows of a pair have in common."""
    return {name: row.data[name] for name in ("prompt", *CONTEXT_FIELDS) if name in row.data}


def _join(rows: Iterable[Row]) -> Iterator[Row]:
    """Join each two rows of a run with one prompt; an odd run is left for `_content`."""
    for shared, group in groupby(rows, key=_shared):
        run = list(group)
        size = 2 if len(run) % 2 == 0 else len(run)
        for first in range(0, len(run), size):
            two = run[first : first + size]
            responses = [row.data.get("response") for row in two]
            data = {"responses": responses, "ratings_a": two[0].data, "ratings_b": two[-1].data}
            yield Row(two[0].where, two[0].number, shared | data, two[0].use)


def prompt_turns(row: Row) -> list[Turn]:
    """The turns of the field `prompt`, which has marks between them where there are several."""
    pieces = _TURN.split(as_text(row, "prompt", row.data.get("prompt")))
    roles = ["user", *(who.lower() for who in pieces[1::2])]
    return [{"role": r, "content": c} for r, c in zip(roles, pieces[::2], strict=True)]


def _content(row: Row) -> Content:
    responses = row.data["responses"]
    if len(responses) != 2:
        raise row.error(
            "prompt",
            "be shared by two consecutive rows, or an even number of them",
            f"{len(responses)}",
            "which responses to compare is ambiguous: pair them before, or set on_bad to 'skip'",
        )
    return (
        prompt_turns(row),
        as_text(row, "response", responses[0]),
        as_text(row, "response", responses[1]),
    )


def rated(row: Row, objective: str) -> float | None:
    """By how much `ratings_a` is above `ratings_b`, None where neither has the rating."""
    sides = (row.data["ratings_a"], row.data["ratings_b"])
    if not any(objective in side for side in sides):
        return None
    a, b = (as_rating(row, objective, side.get(objective, _MISSING)) for side in sides)
    return above(a, b)


FORMAT = Format(
    "helpsteer2",
    {"prompt", "response"},
    _content,
    rated,
    also=lambda names: bool(names & _RATINGS),
    join=_join,
    label_fields=lambda row: row.data["ratings_a"].keys() - {"prompt", "response"},
    is_label=lambda name, value: name in _RATINGS,
)
