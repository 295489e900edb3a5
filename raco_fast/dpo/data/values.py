"""How a value of a data file appears in a message: names and numbers as written, texts never."""

import re
from typing import TypeGuard

_NAME = re.compile(r"[!-~]{0,40}")


class Cell(str):
    """Text of a table that has nothing but texts: a number or a list where one is asked for."""

    __slots__ = ()


def show(value: object) -> str:
    """A label or a name: as written when it is short and one word, else as `shape` has it."""
    if isinstance(value, str):
        return repr(value) if _NAME.fullmatch(value) else shape(value)
    if value is None or isinstance(value, (bool, int, float)):
        text = repr(value)
        return text if len(text) <= 40 else f"{type(value).__name__} of {len(text)} digits"
    return shape(value)


def shape(value: object) -> str:
    """Prompt or response content: type and length, never the text."""
    size = f" of length {len(value)}" if isinstance(value, (str, list, dict)) else ""
    return f"{type(value).__name__}{size}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, which JSON's true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, or a text, list or object with nothing in it."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)
