"""The formats preference data comes in: from one row to (prompt, response a, response b, labels).

| name | fields | labels |
|---|---|---|
| `raco` | prompt (turns), response_a, response_b, preferences {objective: +1, -1, 0} | by name |
| `chosen-rejected` | chosen, rejected, and maybe prompt; text, turns, or transcripts | one, +1 |
| `raco-s` | chosen, rejected (as above), raco_s_<objective>: +1, -1, 0 | by name |
| `summary-ab` | Summary_A, Summary_B (turns), <Objective>: "A" or "B" | by name, any case |
| `pku` | prompt, response_0, response_1, better_response_id, safer_response_id: 0 or 1 | by name |
| `helpsteer2` | prompt, response, numeric ratings; two consecutive rows a prompt | by rating |
| `text-score` | text: [transcript, transcript], score: [number, number] | one, by score |

`chosen-rejected` covers TRL's preference formats and Anthropic's transcripts ("\\n\\nHuman: ...
\\n\\nAssistant: ..."). Without a `prompt` field, the turns both sides share are the prompt. TRL's
fourth form, two plain texts without a prompt, is refused: where the prompt ends can only be
guessed from the common characters, and two answers that begin alike move the guess into the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raco_fast.dpo.data.rows import Row, shape, show

__all__ = ["FORMATS", "Content", "Format", "detect_format", "format_named"]

Turn = dict[str, str]
Content = tuple[list[Turn], str, str]

_HUMAN = "\n\nHuman:"
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_PKU_COLUMNS = {"helpful": "better_response_id", "harmless": "safer_response_id"}


def _no_join(rows: Iterable[Row]) -> Iterator[Row]:
    return iter(rows)


@dataclass(frozen=True)
class Format:
    """How one format is read.

    Attributes:
        name: as in the table above.
        content: row -> (prompt turns, response a, response b); checks types, not emptiness.
        label: (row, field name) -> +1, -1, 0, or None where the row has no such field; None for
            a format that carries no label field (response a is the preferred one).
        join: rows of the file -> rows of pairs.
    """

    name: str
    content: Callable[[Row], Content]
    label: Callable[[Row, str], int | None] | None
    join: Callable[[Iterable[Row]], Iterator[Row]] = _no_join

    def fields(self, row: Row) -> str:
        """The fields a label could be in, for messages."""
        for key in ("preferences", "ratings_a"):
            if isinstance(row.data.get(key), dict):
                return _listed(row.data[key])
        return _listed(row.data)


def _listed(names: Iterable[str], limit: int = 12) -> str:
    ordered = sorted(names)
    more = f", and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"[{', '.join(repr(name[:40]) for name in ordered[:limit])}{more}]"


def format_named(name: str) -> Format:
    """The format of that name. Raises ValueError with the known names."""
    if name not in FORMATS:
        raise ValueError(f"`format` must be 'auto' or one of {sorted(FORMATS)}, got {name!r}")
    return FORMATS[name]


def detect_format(row: Row) -> Format:
    """The format whose fields the row has. Raises ValueError that lists the fields found."""
    keys = set(row.data)
    if {"response_a", "response_b", "preferences"} <= keys:
        return FORMATS["raco"]
    if {"Summary_A", "Summary_B"} <= keys:
        return FORMATS["summary-ab"]
    if {"chosen", "rejected"} <= keys:
        scored = any(key.startswith("raco_s_") for key in keys)
        return FORMATS["raco-s" if scored else "chosen-rejected"]
    if {"response_0", "response_1"} <= keys and keys & {"better_response_id", "safer_response_id"}:
        return FORMATS["pku"]
    if {"prompt", "response"} <= keys and keys & set(_RATINGS):
        return FORMATS["helpsteer2"]
    if {"text", "score"} <= keys:
        return FORMATS["text-score"]
    raise ValueError(
        f"{row.where}: `format` must be recognisable from the first row's fields, got "
        f"{_listed(keys)}; rename the fields to a format of {sorted(FORMATS)} (the fields of each "
        "are in raco_fast/dpo/data/formats.py)"
    )


def _get(row: Row, field: str) -> Any:
    if field not in row.data:
        raise ValueError(
            f"{row.where}: `{field}` must be present, got the fields {_listed(row.data)}; "
            "every row of a file has the fields of its format"
        )
    return row.data[field]


def _text(row: Row, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise row.error(field, "be text", shape(value), "write a string")
    return value


def _turns(row: Row, field: str, value: object) -> list[Turn]:
    if not isinstance(value, list):
        raise row.error(
            field, "be a list of turns", shape(value), 'write [{"role": .., "content": ..}]'
        )
    turns = []
    for k, turn in enumerate(value):
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            found = _listed(turn) if isinstance(turn, dict) else shape(turn)
            raise row.error(f"{field}[{k}]", "have a role and a content", found, "add them")
        turns.append({x: _text(row, f"{field}[{k}].{x}", turn[x]) for x in ("role", "content")})
    return turns


def _transcript(row: Row, field: str, text: str) -> list[Turn]:
    """Turns of an Anthropic transcript; the space around each turn's text is not part of it."""
    if not text.startswith(_HUMAN):
        raise row.error(
            field,
            "be turns, or a transcript that begins with '\\n\\nHuman:'",
            f"{len(text)} characters of text",
            "add a `prompt` field: without one, prompt and answer cannot be told apart",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    pieces = _TRANSCRIPT_TURN.split(text)[1:]
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _prompt(row: Row, value: object) -> list[Turn]:
    """A prompt given as turns, as one user's text, or as a transcript that opens the answer."""
    if not isinstance(value, str):
        return _turns(row, "prompt", value)
    if value.startswith(_HUMAN):
        turns = _transcript(row, "prompt", value)
        opens_answer = turns[-1] == {"role": "assistant", "content": ""}
        return turns[:-1] if opens_answer else turns
    return [{"role": "user", "content": value}]


def _answer(row: Row, field: str, turns: list[Turn], prompt: list[Turn]) -> str:
    """The one assistant turn that follows the prompt (which the turns may repeat)."""
    rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if [turn["role"] for turn in rest] != ["assistant"]:
        roles = ", ".join(turn["role"][:12] for turn in rest[:6]) or "nothing"
        raise row.unusable(
            field,
            "add one assistant turn to the prompt",
            f"{len(rest)} turns ({roles})",
            "keep one response a row, with the same turns before it on both sides",
        )
    return rest[0]["content"]


def _shared_prompt(row: Row, fields: tuple[str, str], sides: list[list[Turn]]) -> Content:
    """Prompt = the turns both sides share, but never a side's last turn."""
    a, b = sides
    n = 0
    while n < min(len(a), len(b)) - 1 and a[n] == b[n]:
        n += 1
    prompt = a[:n]
    return prompt, _answer(row, fields[0], a, prompt), _answer(row, fields[1], b, prompt)


def _two_sides(row: Row, fields: tuple[str, str]) -> Content:
    values = [_get(row, field) for field in fields]
    texts = [isinstance(value, str) for value in values]
    if texts[0] != texts[1]:
        raise row.error(
            fields[1],
            f"be of the same kind as `{fields[0]}`",
            f"{type(values[0]).__name__} and {type(values[1]).__name__}",
            "write both as text or both as turns",
        )
    read = _transcript if texts[0] else _turns
    if "prompt" not in row.data:
        return _shared_prompt(
            row, fields, [read(row, *s) for s in zip(fields, values, strict=True)]
        )
    prompt = _prompt(row, row.data["prompt"])
    if texts[0] and not values[0].startswith(_HUMAN):
        return prompt, _text(row, fields[0], values[0]), _text(row, fields[1], values[1])
    sides = [read(row, *s) for s in zip(fields, values, strict=True)]
    a, b = (_answer(row, f, turns, prompt) for f, turns in zip(fields, sides, strict=True))
    return prompt, a, b


def _signed(row: Row, field: str, value: object) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value not in (-1, 0, 1):
        raise row.error(
            field, "be +1, -1 or 0", show(value), "an unknown label is never read as a tie"
        )
    return int(value)


def _raco_label(row: Row, column: str) -> int | None:
    preferences = _get(row, "preferences")
    if not isinstance(preferences, dict):
        raise row.error(
            "preferences", "map objectives to labels", shape(preferences), "write an object"
        )
    if column not in preferences:
        return None
    return _signed(row, f"preferences.{column}", preferences[column])


def _raco_s_label(row: Row, column: str) -> int | None:
    field = f"raco_s_{column.removeprefix('raco_s_')}"
    return _signed(row, field, row.data[field]) if field in row.data else None


def _summary_ab_label(row: Row, column: str) -> int | None:
    names = [key for key in row.data if key.casefold() == column.casefold()]
    field = column if column in row.data else names[0] if len(names) == 1 else None
    if field is None:
        return None
    value = row.data[field]
    if value not in ("A", "B"):
        raise row.error(
            field, "be 'A' or 'B'", show(value), "an unknown label is never read as a tie"
        )
    return 1 if value == "A" else -1


def _pku_label(row: Row, column: str) -> int | None:
    field = column if column in row.data else _PKU_COLUMNS.get(column)
    if field is None or field not in row.data:
        return None
    value = row.data[field]
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise row.error(
            field, "be 0 or 1", show(value), "it names the preferred response by its number"
        )
    return 1 if value == 0 else -1


def _rating_label(row: Row, column: str) -> int | None:
    sides = (row.data["ratings_a"], row.data["ratings_b"])
    if not any(column in side for side in sides):
        return None
    a, b = (_number(row, column, side.get(column)) for side in sides)
    return (a > b) - (a < b)


def _number(row: Row, field: str, value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):  # type: ignore[arg-type]
        raise row.error(
            field, "be a finite number for both responses", show(value), "write the rating"
        )
    return float(value)  # type: ignore[arg-type]


def _raco_content(row: Row) -> Content:
    a, b = (_text(row, f, _get(row, f)) for f in ("response_a", "response_b"))
    return _turns(row, "prompt", _get(row, "prompt")), a, b


def _summary_ab_content(row: Row) -> Content:
    return _two_sides(row, ("Summary_A", "Summary_B"))


def _chosen_rejected_content(row: Row) -> Content:
    return _two_sides(row, ("chosen", "rejected"))


def _pku_content(row: Row) -> Content:
    a, b = (_text(row, f, _get(row, f)) for f in ("response_0", "response_1"))
    return _prompt(row, _get(row, "prompt")), a, b


def _helpsteer2_join(rows: Iterable[Row]) -> Iterator[Row]:
    """Join each run of rows with one prompt; a run of other than two is left for `content`."""
    run: list[Row] = []
    for row in rows:
        if run and _get(row, "prompt") != run[0].data["prompt"]:
            yield _joined(run)
            run = []
        _get(row, "prompt")
        run.append(row)
    if run:
        yield _joined(run)


def _joined(run: list[Row]) -> Row:
    sides = [{"response": _get(r, "response")} for r in run]
    ratings = [{k: v for k, v in r.data.items() if k not in ("prompt", "response")} for r in run]
    data = {
        "prompt": run[0].data["prompt"],
        "responses": [side["response"] for side in sides],
        "ratings_a": ratings[0],
        "ratings_b": ratings[-1],
    }
    return Row(run[0].where, run[0].number, data)


def _helpsteer2_content(row: Row) -> Content:
    responses = row.data["responses"]
    if len(responses) != 2:
        raise row.unusable(
            "prompt",
            "be shared by exactly two consecutive rows",
            f"{len(responses)}",
            "which responses to compare is ambiguous: pair them before, or set on_bad to 'skip'",
        )
    pieces = _HELPSTEER_TURN.split(_text(row, "prompt", row.data["prompt"]))
    roles = ["user", *("user" if who == "User" else "assistant" for who in pieces[1::2])]
    prompt = [{"role": r, "content": c} for r, c in zip(roles, pieces[::2], strict=True)]
    return prompt, _text(row, "response", responses[0]), _text(row, "response", responses[1])


def _text_score_content(row: Row) -> Content:
    for field in ("text", "score"):
        value = _get(row, field)
        if not isinstance(value, list) or len(value) != 2:
            raise row.error(field, "be a list of two", shape(value), "give one entry a response")
    order = (0, 1) if _score(row, 0) > _score(row, 1) else (1, 0)
    if _score(row, 0) == _score(row, 1):
        raise row.unusable("score", "differ", "two equal scores", "remove the row: it is a tie")
    texts = [_text(row, "text", row.data["text"][k]) for k in order]
    return _shared_prompt(row, ("text", "text"), [_transcript(row, "text", t) for t in texts])


def _score(row: Row, k: int) -> float:
    return _number(row, f"score[{k}]", row.data["score"][k])


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("raco", _raco_content, _raco_label),
        Format("chosen-rejected", _chosen_rejected_content, None),
        Format("raco-s", _chosen_rejected_content, _raco_s_label),
        Format("summary-ab", _summary_ab_content, _summary_ab_label),
        Format("pku", _pku_content, _pku_label),
        Format("helpsteer2", _helpsteer2_content, _rating_label, _helpsteer2_join),
        Format("text-score", _text_score_content, None),
    )
}
