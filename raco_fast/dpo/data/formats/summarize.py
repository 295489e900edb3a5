"""OpenAI's summaries of posts and articles that people compared or rated.

- `summarize-comparisons`: info, summaries (two) and choice, the number of the better one.
- `summarize-axes`: info and one summary with axes (overall, accuracy, coverage, coherence), each a
  rating from 1 to 7 or null. Rows of one `info.id` are ratings of summaries of one text: those of
  one summary are averaged, and each two summaries are a pair.

The prompt is the text, as its readers saw it, with "TL;DR:" behind it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from raco_fast.dpo.data.formats.cells import spelled
from raco_fast.dpo.data.formats.fields import (
    above,
    as_choice,
    as_list,
    as_object,
    as_rating,
    as_text,
    field,
)
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.formats.turns import Turn
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import is_empty, shape

_PARTS = (("subreddit", "SUBREDDIT: r/"), ("title", "TITLE: "), ("post", "POST: "))


def _prompt(row: Row) -> list[Turn]:
    info = as_object(row, "info", field(row, "info"))
    parts = [*_PARTS, ("article", "ARTICLE: ")] if is_empty(info.get("post")) else _PARTS
    texts = [
        f"{head}{as_text(row, f'info.{name}', info[name]).strip()}"
        for name, head in parts
        if not is_empty(info.get(name))
    ]
    if is_empty(info.get("post")) and is_empty(info.get("article")):
        rule, cure = "hold a post or an article", "add one, or remove the row"
        raise row.error("info", rule, "neither", cure)
    return [{"role": "user", "content": "\n\n".join([*texts, "TL;DR:"])}]


def _summary(row: Row, name: str, value: object) -> str:
    return as_text(row, f"{name}.text", as_object(row, name, value).get("text"))


def _compared(row: Row) -> Content:
    given = as_list(field(row, "summaries"))
    if given is None or len(given) != 2:
        found = shape(row.data["summaries"])
        raise row.error("summaries", "be a list of two", found, "give both summaries")
    a, b = (_summary(row, f"summaries[{k}]", value) for k, value in enumerate(given))
    return _prompt(row), a, b


def _choice(row: Row, name: str) -> float | None:
    if name != "choice" or name not in row.data:
        return None
    return as_choice(row, name, row.data[name], (0, 1), "be 0 or 1, the number of a summary")


def _by_text(rows: Iterable[Row]) -> Iterator[Row]:
    """Each two summaries of one text, in the order that the texts come in.

    A text with one summary, or a row whose text is not known, is left for `_rated`.
    """
    texts: dict[object, dict[object, list[Row]]] = {}
    for row in rows:
        info, summary = spelled(row.data.get("info")), spelled(row.data.get("summary"))
        key = info.get("id") if isinstance(info, dict) else None
        said = summary.get("text") if isinstance(summary, dict) else None
        of_text = texts.setdefault(key if isinstance(key, (str, int)) else id(row), {})
        of_text.setdefault(said if isinstance(said, str) else id(row), []).append(row)
    for of_text in texts.values():
        first, *others = groups = list(of_text.values())
        if not others:
            yield _two(first[0], first, first, None)
        for (a, of_a), (b, of_b) in combinations(enumerate(groups), 2):
            yield _two(first[0], of_a, of_b, (a, b))


def _two(first: Row, of_a: list[Row], of_b: list[Row], sides: tuple[int, int] | None) -> Row:
    """The row of a pair, of the text's first row and the ratings of its two summaries."""
    data = {"info": first.data.get("info"), "rows_a": of_a, "rows_b": of_b}
    return replace(first, data=data, sides=sides)


def _rated(row: Row) -> Content:
    prompt, sides = _prompt(row), (row.data["rows_a"][0], row.data["rows_b"][0])
    a, b = (_summary(side, "summary", field(side, "summary")) for side in sides)
    if row.sides is None:
        rule, cure = "come with two summaries at least", "remove the row: no pair"
        raise row.error("info.id", rule, "one", cure)
    return prompt, a, b


def _axis(row: Row, name: str) -> float | None:
    """By how much the mean rating of the first summary is above that of the second."""
    sides = [_ratings(row.data[side], name) for side in ("rows_a", "rows_b")]
    return above(*map(_mean, sides)) if any(sides) else None


def _ratings(rows: list[Row], name: str) -> list[float | None]:
    """The ratings that people gave a summary on an axis; None where one left it out."""
    return [
        as_rating(row, f"summary.axes.{name}", axes[name])
        for row, axes in zip(rows, map(_axes, rows), strict=True)
        if name in axes
    ]


def _axes(row: Row) -> dict[str, Any]:
    summary = as_object(row, "summary", field(row, "summary"))
    return as_object(row, "summary.axes", summary.get("axes"))


def _mean(ratings: list[float | None]) -> float | None:
    given = [rating for rating in ratings if rating is not None]
    return sum(given) / len(given) if given else None


COMPARISONS = Format(
    "summarize-comparisons",
    {"info", "summaries", "choice"},
    _compared,
    _choice,
    only="choice",
)
AXES = Format(
    "summarize-axes",
    {"info", "summary"},
    _rated,
    _axis,
    join=_by_text,
    label_fields=lambda row: _axes(row.data["rows_a"][0]),
)
