"""Rows of a data file with the place they came from: JSON Lines (gzip or not) or a JSON list.

The reader is strict on purpose. A line that is empty, cut off or not UTF-8 is an error that names
file and line: a damaged file that trains anyway is a wrong result that goes unnoticed. What is
wrong with one row is a `RowError`, and reading goes on behind it; all else is an error of the file.
Messages never quote prompts or responses, which may be private or harmful; they give lengths.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from raco_fast.dpo.data.field_use import Fields, FieldUse
from raco_fast.dpo.data.file_kinds import GZIP_MAGIC, check_kind
from raco_fast.dpo.data.strict_json import Fault, decode, decode_at, skip_space
from raco_fast.settings.paths import expanded

_HEAD = 4096  # bytes that show what kind of file it is


class RowError(ValueError):
    """What is wrong with one row, which `on_bad="skip"` leaves out."""


@dataclass(frozen=True)
class Row:
    """One row and its place.

    Attributes:
        where: "file:line", with the item's number added for a JSON list.
        number: 1-based number of the row in its file.
        data: the JSON object.
        use: which fields of the file were used.
        sides: which two of the row's answers are a pair, counted from 0, where it has several.
    """

    where: str
    number: int
    data: dict[str, Any]
    use: FieldUse = field(default_factory=FieldUse, compare=False, repr=False)
    sides: tuple[int, int] | None = None

    def error(self, field: str, rule: str, found: str, cure: str) -> RowError:
        """The error for a field that breaks a rule; `found` is made with `show` or `shape`."""
        return RowError(f"{self.where}: `{field}` must {rule}, got {found}; {cure}")


def read_rows(path: str | Path) -> Iterator[Row | RowError]:
    """Yield the rows of a data file in order, without reading further than asked.

    A row that cannot be read is yielded as the error that says why: an empty line, bad JSON, not
    UTF-8, not an object, a key twice, half a character, a number of hundreds of digits.

    Args:
        path: JSON Lines or one JSON list, UTF-8; gzip is recognised by content, not by name.
    Raises:
        OSError: no such file, a folder, or not readable.
        ValueError: no rows; a file of another kind; a truncated or damaged gzip stream; a JSON list
            that cannot be read on. Names the file, and the line where there is one.
    """
    file = expanded(path)
    _check_is_file(file)
    with _named(file):
        with file.open("rb") as raw:
            head = raw.read(_HEAD)
        packed = head.startswith(GZIP_MAGIC)
        if packed:
            head = _unpacked_head(file)
    check_kind(file, head)
    row = None
    with _named(file), gzip.open(file, "rb") if packed else file.open("rb") as stream:
        for row in _rows(file, cast(BinaryIO, stream), FieldUse()):
            yield row
    if row is None:
        raise ValueError(f"{file}:1: a data file must hold at least one row, got none; remove it")


def _check_is_file(file: Path) -> None:
    if file.is_file():
        return
    if file.is_dir():
        found, cure = "a folder", "name a file in it"
    elif file.exists():
        found, cure = "no regular file", "write what it gives to a file"
    else:
        found, cure = "not there", "check the path (a relative one starts at the working directory)"
    raise FileNotFoundError(
        f"`path` must be a data file, got {str(file)!r}, which is {found}; {cure}"
    )


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Let an error of the file system begin with the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{file}: a data file must be readable, got {error}; mend that") from error


def _unpacked_head(file: Path) -> bytes:
    """The first bytes of a gzip stream; none of a damaged one, whose reader says where it is."""
    try:
        with gzip.open(file, "rb") as stream:
            return stream.read(_HEAD)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return b""


def _rows(file: Path, stream: BinaryIO, use: FieldUse) -> Iterator[Row | RowError]:
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


def _decoded_lines(file: Path, stream: BinaryIO) -> Iterator[tuple[int, str | RowError]]:
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
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield (
                number,
                RowError(
                    f"{file}:{number}: text must be UTF-8, got byte 0x{line[error.start]:02x} "
                    f"at position {error.start} of the line; convert the file"
                ),
            )


def _readable(lines: Iterable[tuple[int, str | RowError]]) -> Iterator[str]:
    """The lines of a JSON list, none of which can be left out."""
    for _, line in lines:
        if isinstance(line, RowError):
            raise ValueError(str(line))
        yield line


def _list_rows(file: Path, text: str, use: FieldUse) -> Iterator[Row | RowError]:
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
