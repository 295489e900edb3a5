"""Rows of JSON Lines or of one JSON list.

The reader is strict on purpose. A line that is empty, cut off or not UTF-8 is an error that names
file and line: a damaged file that trains anyway is a wrong result that goes unnoticed.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

from raco_fast.dpo.data.field_use import Fields, FieldUse
from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.dpo.data.strict_json import Fault, decode, decode_at, skip_space

CUT_OFF = (EOFError, zlib.error, gzip.BadGzipFile)
"""What reading a gzip stream raises where it is cut off or damaged."""


def json_rows(file: str, stream: BinaryIO, use: FieldUse) -> Iterator[Row | RowError]:
    """Yield the rows of a stream in order, without reading further than asked.

    A row that cannot be read is yielded as the error that says why: an empty line, bad JSON, not
    UTF-8, not an object, a key twice, half a character, a number of hundreds of digits.

    Args:
        file: its name, for messages.
        use: notes which fields are read.
    Raises:
        ValueError: a truncated or damaged gzip stream; a JSON list that cannot be read on.
    """
    lines: Iterable[tuple[int, str | RowError]] = _decoded_lines(file, stream)
    first = next(iter(lines), None)
    if first is None:
        return
    if isinstance(first[1], str) and first[1].lstrip().startswith("["):
        lines = list(lines)
        if _is_blank(lines) or not _is_one_list(first[1]):
            yield from _list_rows(file, first[1] + "".join(_readable(lines)), use)
            return
    for number, line in chain([first], lines):
        yield _row_of_line(f"{file}:{number}", number, line, use)


def _is_one_list(line: str) -> bool:
    """Whether a line holds a whole JSON list: with more behind it, it is a bad row."""
    try:
        decode(line)
    except json.JSONDecodeError:
        return False
    return True


def _is_blank(lines: Iterable[tuple[int, str | RowError]]) -> bool:
    return not any(isinstance(line, RowError) or line.strip() for _, line in lines)


def _row_of_line(where: str, number: int, line: str | RowError, use: FieldUse) -> Row | RowError:
    if isinstance(line, RowError):
        return line
    if not line.strip():
        return RowError(
            f"{where}: a line must hold one JSON object, got an empty line; "
            "delete it, or write the file again if it was cut off"
        )
    try:
        value, fault = decode(line)
    except json.JSONDecodeError as error:
        return _bad_json(where, error, begins_object=line.strip() == "{")
    return _checked(where, number, value, fault, use)


def _decoded_lines(file: str, stream: BinaryIO) -> Iterator[tuple[int, str | RowError]]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline()
        except CUT_OFF as error:
            raise ValueError(cut_off(f"{file}:{number}", error)) from error
        if not line:
            return
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield (
                number,
                RowError(
                    f"{file}:{number}: text must be UTF-8, got byte 0x{line[error.start]:02x} "
                    f"at position {error.start} of the line; convert the file"
                ),
            )


def cut_off(where: str, error: Exception) -> str:
    """The message for a gzip stream that ends too early, or is damaged, at a place."""
    return (
        f"{where}: the gzip stream must be complete, got {error}; the file is cut off or damaged "
        f"here, copy or write it again"
    )


def _readable(lines: Iterable[tuple[int, str | RowError]]) -> Iterator[str]:
    """The lines of a JSON list, none of which can be left out."""
    for _, line in lines:
        if isinstance(line, RowError):
            raise ValueError(str(line))
        yield line


def _list_rows(file: str, text: str, use: FieldUse) -> Iterator[Row | RowError]:
    at, counted, line, item, mark = text.index("["), 0, 1, 0, ","
    while mark == ",":
        at = skip_space(text, at + 1)
        if item == 0 and text[at : at + 1] == "]":
            return
        item += 1
        line += text.count("\n", counted, at)
        counted = at
        where = f"{file}:{line} (item {item})"
        try:
            value, at, fault = decode_at(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(str(_bad_json(where, error))) from error
        yield _checked(where, item, value, fault, use)
        at = skip_space(text, at)
        mark = text[at : at + 1]
        if mark not in (",", "]"):
            raise ValueError(
                f"{where}: an item must be followed by ',' or ']', got {_mark(mark)}; "
                "the list is cut off or damaged here, write the file again"
            )
    at = skip_space(text, at + 1)
    if at != len(text):
        raise ValueError(
            f"{file}: a JSON list must end the file, got {len(text) - at} characters after ']'; "
            "remove them"
        )


def _mark(mark: str) -> str:
    return repr(mark) if mark else "the end"


def _checked(
    where: str, number: int, value: object, fault: Fault | None, use: FieldUse
) -> Row | RowError:
    if fault is not None:
        what = "a row" if fault.field is None else f"`{ascii(fault.field[:40])[1:-1]}`"
        return RowError(f"{where}: {what} must {fault.rule}, got {fault.found}; {fault.cure}")
    if not isinstance(value, dict):
        return RowError(
            f"{where}: a row must be a JSON object, got {type(value).__name__}; "
            "write one object with the fields of the format"
        )
    return Row(where, number, Fields(value, use), use)


def _bad_json(where: str, error: json.JSONDecodeError, begins_object: bool = False) -> RowError:
    cure = "the row is half-written or damaged, write it again"
    if begins_object:
        cure = "write every object on one line, or all of them as one JSON list"
    return RowError(
        f"{where}: a row must be complete JSON, got an error at column {error.colno} "
        f"({error.msg}); {cure}"
    )
