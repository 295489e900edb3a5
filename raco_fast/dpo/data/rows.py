"""Rows of a data file with the place they came from: JSON Lines (gzip or not) or a JSON list.

The reader is strict on purpose. A line that is empty, cut off or not UTF-8 is an error that names
file and line: a damaged file that trains anyway is a wrong result that goes unnoticed.
Messages never quote prompts or responses, which may be private or harmful; they give lengths.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast

from raco_fast.settings.paths import expanded

_GZIP_MAGIC = b"\x1f\x8b"


class RowError(ValueError):
    """A readable row that cannot be a pair: an empty, identical or several-turn response."""


def show(value: object, limit: int = 40) -> str:
    """A label or a name for an error message: as written when short, else as `shape` has it."""
    text = repr(value)
    return text if len(text) <= limit else shape(value)


def shape(value: object) -> str:
    """Prompt or response content for an error message: type and length, never the text."""
    size = f" of length {len(value)}" if isinstance(value, (str, list, dict)) else ""
    return f"{type(value).__name__}{size}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, which JSON's true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Row:
    """One row and its place.

    Attributes:
        where: "file:line", with the item's number added for a JSON list.
        number: 1-based number of the row in its file.
        data: the JSON object.
    """

    where: str
    number: int
    data: dict[str, Any]

    def error(self, field: str, rule: str, found: str, cure: str) -> ValueError:
        """The error for a field that breaks a rule; `found` is made with `show` or `shape`."""
        return ValueError(f"{self.where}: `{field}` must {rule}, got {found}; {cure}")

    def unusable(self, field: str, rule: str, found: str, cure: str) -> RowError:
        """The error for a row that cannot be a pair, which `on_bad="skip"` may leave out."""
        return RowError(f"{self.where}: `{field}` must {rule}, got {found}; {cure}")


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a data file in order, without reading further than asked.

    Args:
        path: JSON Lines or one JSON list, UTF-8; gzip is recognised by content, not by name.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows; an empty line; bad JSON; not an object; not UTF-8; a truncated or
            damaged gzip stream. Names file and line.
    """
    file = expanded(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"`path` must be a data file, got {str(path)!r}, which does not exist or is no file; "
            "check the path (relative paths start at the working directory)"
        )
    with file.open("rb") as raw:
        packed = raw.read(2) == _GZIP_MAGIC
    row = None
    with gzip.open(file, "rb") if packed else file.open("rb") as stream:
        for row in _rows(file, cast(BinaryIO, stream)):
            yield row
    if row is None:
        raise ValueError(f"{file}:1: a data file must hold at least one row, got none; remove it")


def _rows(file: Path, stream: BinaryIO) -> Iterator[Row]:
    lines = _decoded_lines(file, stream)
    for number, line in lines:
        where = f"{file}:{number}"
        if number == 1 and line.lstrip().startswith("["):
            yield from _list_rows(file, line + "".join(text for _, text in lines))
            return
        if not line.strip():
            raise ValueError(
                f"{where}: a line must hold one JSON object, got an empty line; "
                "delete it, or write the file again if it was cut off"
            )
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _bad_json(where, error) from error
        yield Row(where, number, _checked_object(where, value))


def _decoded_lines(file: Path, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{file}:{number}: the gzip stream must be complete, got {error}; "
                "the file is cut off or damaged here, copy or write it again"
            ) from error
        if not line:
            return
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}:{number}: text must be UTF-8, got byte 0x{line[error.start]:02x} "
                f"at position {error.start} of the line; convert the file"
            ) from error
        yield number, text


def _list_rows(file: Path, text: str) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    at, counted, line, item, mark = text.index("["), 0, 1, 0, ","
    while mark == ",":
        at = _skip_space(text, at + 1)
        if item == 0 and text[at : at + 1] == "]":
            return
        item += 1
        line += text.count("\n", counted, at)
        counted = at
        where = f"{file}:{line} (item {item})"
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _bad_json(where, error) from error
        yield Row(where, item, _checked_object(where, value))
        at = _skip_space(text, at)
        mark = text[at : at + 1]
        if mark not in (",", "]"):
            raise ValueError(
                f"{where}: an item must be followed by ',' or ']', got {mark or 'the end'!r}; "
                "the list is cut off or damaged here, write the file again"
            )
    at = _skip_space(text, at + 1)
    if at != len(text):
        raise ValueError(
            f"{file}: a JSON list must end the file, got {len(text) - at} characters after ']'; "
            "remove them"
        )


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _checked_object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: a row must be a JSON object, got {type(value).__name__}; "
            "write one object with the fields of the format"
        )
    return value


def _bad_json(where: str, error: json.JSONDecodeError) -> ValueError:
    return ValueError(
        f"{where}: a row must be complete JSON, got an error at column {error.colno} "
        f"({error.msg}); the row is half-written or damaged, write it again"
    )
