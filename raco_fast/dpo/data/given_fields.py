"""What a pair holds besides its texts: tools, turns of tools, and further fields of turns.

Nobody can tell from a chat template's text what it does with them. It is seen by rendering a pair
again without the one in question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from raco_fast.dpo.data.pairs import PreferencePair

_OF_EVERY_TURN = ("role", "content")


def has_given_fields(pair: PreferencePair) -> bool:
    """Whether there is anything that `without_each` leaves out."""
    return bool(pair.tools or pair.answer_a or pair.answer_b) or any(
        len(turn) > len(_OF_EVERY_TURN) or turn["role"] == "tool" for turn in pair.prompt
    )


def without_each(pair: PreferencePair) -> Iterator[tuple[str, PreferencePair]]:
    """What a pair holds besides its texts, each with the pair that lacks it.

    A field of the responses comes once for each of them that has it, under one name.
    """
    if pair.tools:
        yield "tools", replace(pair, tools=[])
    if any(turn["role"] == "tool" for turn in pair.prompt):
        yield "tool turns", replace(pair, prompt=[t for t in pair.prompt if t["role"] != "tool"])
    for name in dict.fromkeys(name for turn in pair.prompt for name in _further(turn)):
        yield f"prompt.{name}", replace(pair, prompt=[_less(turn, name) for turn in pair.prompt])
    for name in _further(pair.answer_a):
        yield f"response.{name}", replace(pair, answer_a=_less(pair.answer_a, name))
    for name in _further(pair.answer_b):
        yield f"response.{name}", replace(pair, answer_b=_less(pair.answer_b, name))


def texts(pair: PreferencePair) -> Iterator[tuple[str, str]]:
    """Every string of a pair that a template can write, keys included, with its place."""
    given: list[tuple[str, Any]] = [
        (f"prompt[{k}].{name}", value)
        for k, turn in enumerate(pair.prompt)
        for name, value in turn.items()
        if name != "role"
    ]
    names = ("response_a", "response_b", "answer_a", "answer_b", "tools")
    given += [(name, getattr(pair, name)) for name in names]
    while given:  # not recursive: a row may be nested deeper than Python's stack
        place, value = given.pop()
        if isinstance(value, str):
            yield place, value
        elif isinstance(value, Mapping):
            given += [(f"{place}.{key}", inner) for key, inner in value.items()]
            yield from ((f"{place} (a key)", str(key)) for key in value)
        elif isinstance(value, (list, tuple)):
            given += [(f"{place}[{k}]", inner) for k, inner in enumerate(value)]


def _further(turn: Mapping[str, Any]) -> list[str]:
    """Names of the fields that say something; exporters fill in null and empty lists."""
    empty: tuple[Any, ...] = (None, "", [], {})
    return [n for n, v in turn.items() if n not in _OF_EVERY_TURN and v not in empty]


def _less(turn: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key != name}
