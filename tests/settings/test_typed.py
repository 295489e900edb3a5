"""Plain values as dataclasses: what does not fit is named, with the rule and the cure."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from raco_fast.settings.typed import typed


@dataclass(frozen=True)
class Inner:
    size: int = 1
    word: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.1
    pair: tuple[float, float] = (0.1, 0.2)
    many: tuple[str, ...] = ()
    inner: Inner | None = None
    items: list[Inner] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    rule: str | dict[str, Any] = "x"
    flag: bool = False
    count: int | None = None
    texts: str | list[str] | None = None

    def __post_init__(self) -> None:
        if self.rule == "odd":
            raise TypeError("`rule` must not be odd")


def test_values_are_taken_as_the_hints_ask():
    value = {
        "name": "a",
        "rate": 3,
        "pair": [1, 0.5],
        "many": ["x"],
        "inner": {"size": 4, "word": "right"},
        "items": [{}, {"size": 2}],
        "weights": {"no": 1},
        "rule": {"name": "y", "depth": [1, {"a": None}]},
        "flag": "yes",
        "count": None,
        "texts": ["p", "q"],
    }
    assert typed(value, Outer) == Outer(
        "a",
        3.0,
        (1.0, 0.5),
        ("x",),
        Inner(4, "right"),
        [Inner(), Inner(2)],
        {"no": 1.0},
        {"name": "y", "depth": [1, {"a": None}]},
        True,
        None,
        ["p", "q"],
    )
    assert type(typed(value, Outer).rate) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nam": 1}, r"`nam` is no setting, got 1 for it; did you mean 'name'\?"),
        ({"inner": {"sise": 1}}, r"`inner.sise` is no setting, .*mean 'size'\?"),
        ({"inner": {"zzz": 1}}, r"`inner.zzz` is no setting, .*; there are size, word"),
        ({"name": 3}, "`name` must be a text, got 3; put it in quotes"),
        ({"name": None}, "`name` must be a text, got None; leave it out for its default"),
        ({"rate": "0.1"}, "`rate` must be a number, got '0.1'; write it without quotes"),
        ({"rate": True}, "`rate` must be a number, got True"),
        ({"rate": float("nan")}, "`rate` must be finite, got nan"),
        ({"rate": float("inf")}, "`rate` must be finite, got inf"),
        ({"rate": 10**400}, r"`rate` must be below 2\^63, got a number of 1329 bits"),
        ({"count": 1.0}, "`count` must be a whole number or null, got 1.0"),
        ({"count": -(2**63)}, r"`count` must be below 2\^63, got -9223372036854775808"),
        ({"pair": [1]}, r"`pair` must hold 2 values, got \[1\]"),
        ({"pair": [1, "b"]}, r"`pair\[1\]` must be a number, got 'b'"),
        ({"many": "x"}, "`many` must be a list, got 'x'"),
        ({"inner": {"word": "lft"}}, r"`inner.word` must be one of \['left', 'right'\].*'left'\?"),
        ({"inner": 3}, "`inner` must be a mapping of size, word or null, got 3"),
        ({"items": [{}, 3]}, r"`items\[1\]` must be a mapping of size, word, got 3"),
        ({"weights": {"a": None}}, "`weights.a` must be a number, got None"),
        ({"weights": {1: 0.5}}, "`weights` must have texts as names, got 1; quote it"),
        ({"weights": {"a\ud800": 0.5}}, "must be UTF-8 text without NUL"),
        ({"rule": {"a": [float("nan")]}}, r"`rule.a\[0\]` must be finite"),
        ({"rule": 3}, "`rule` must be a text or a mapping, got 3; put it in quotes"),
        ({"rule": "odd"}, "`rule` must not be odd"),
        ({"flag": "maybe"}, "`flag` must be true or false, got 'maybe'"),
        ({"flag": 1}, "`flag` must be true or false, got 1"),
        ({"name": "a\0"}, "`name` must be UTF-8 text without NUL characters, got"),
        ({"texts": ["a", "\udcff"]}, r"`texts\[1\]` must be UTF-8 text"),
        ({"weights": "x" * 500}, r"got '(x){59}\.\.\. \(str\); correct it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        typed({"name": "n"} | changes, Outer)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="`name` must be given, got no value for it; add it"):
        typed({"rate": 1.0}, Outer)
