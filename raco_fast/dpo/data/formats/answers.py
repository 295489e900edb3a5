"""Rows that hold several answers to one prompt: each two of them are a pair.

`Row.sides` says which two; the id of the pair and its messages name them, counted from 1.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from raco_fast.dpo.data.formats.fields import above, as_list, as_object, as_rating, field
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import shape


def each_two(name: str) -> Callable[[Iterable[Row]], Iterator[Row]]:
    """`Format.join` for rows with a list of answers in the field `name`.

    A row without two answers is passed on as it is, for `two_of` to say what is wrong with it.
    """

    def join(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            count = len(as_list(row.data.get(name)) or ())
            if count < 2:
                yield row
            for a, b in combinations(range(count), 2):
                yield replace(row, where=f"{row.where} (answers {a + 1} and {b + 1})", sides=(a, b))

    return join


def two_of(row: Row, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The row's two answers, each with its place for messages.

    Raises:
        RowError: no list of two answers or more, or one of the two is no object.
    """
    given = as_list(field(row, name))
    if given is None or row.sides is None:
        found = shape(row.data[name])
        raise row.error(name, "be a list of two answers at least", found, "remove the row: no pair")
    return [(f"{name}[{k}]", as_object(row, f"{name}[{k}]", given[k])) for k in row.sides]


def better_rank(row: Row, two: list[tuple[str, dict[str, Any]]]) -> float:
    """How many places the first of two answers is above the second; the best has the least rank."""
    a, b = (as_rating(row, f"{where}.rank", answer.get("rank")) for where, answer in two)
    return above(b, a)
