"""Rows of whatever a source's path names: a file of some kind, standard input, or a data set."""

import gzip
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, cast

from raco_fast.dpo.data.arrow_rows import arrow_rows
from raco_fast.dpo.data.csv_rows import csv_rows
from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.field_use import FieldUse
from raco_fast.dpo.data.file_kinds import GZIP_MAGIC, readable_kind
from raco_fast.dpo.data.hub_rows import HUB, hub_rows, saved_rows, saved_to_disk
from raco_fast.dpo.data.json_rows import CUT_OFF, json_rows
from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.settings.paths import expanded

STDIN = "-"
"""The path of a source that is read from standard input."""

_HEAD = 4096  # bytes that show what kind of file it is


def is_file(path: str) -> bool:
    """Whether a path names something on a disk, which neither a hub's data set nor stdin is."""
    return path != STDIN and not path.startswith(HUB)


def files_of(path: str) -> list[str]:
    """The files that a path names, in order: those that a pattern fits, or the path itself.

    Raises:
        FileNotFoundError: no file fits the pattern.
    """
    if not is_file(path) or not has_magic(path) or expanded(path).exists():
        return [path]
    found = sorted(name for name in glob(str(expanded(path)), recursive=True))
    if not found:
        raise FileNotFoundError(
            f"`path` must name files, got the pattern {path!r}, which fits none; check it (a "
            f"relative one starts at the working directory)"
        )
    return found


def read_rows(source: DataSource) -> Iterator[Row | RowError]:
    """Yield the rows of a source in order, without reading further than asked.

    A row that cannot be read is yielded as the error that says why.

    Args:
        source: its path is no pattern (`files_of`). What a file is, is decided by its content:
            JSON Lines or a list in UTF-8, gzip or not; CSV; Parquet or Arrow.
    Raises:
        OSError: no such file, a folder of something else, or not readable.
        ValueError: no rows; a file of another kind; a damaged one; settings that are not for this
            kind of source. Names the file, and the line where there is one.
    """
    row = None
    for row in _rows(source, FieldUse()):
        yield row
    if row is None:
        once = "pipe rows into it, of which one process can read it once"
        raise ValueError(
            f"{source.path}:1: a data file must hold at least one row, got none; "
            f"{once if source.path == STDIN else 'remove it'}"
        )


def _rows(source: DataSource, use: FieldUse) -> Iterator[Row | RowError]:
    if source.path.startswith(HUB):
        return hub_rows(source.path, source.config, source.split, source.revision, use)
    path = Path(STDIN) if source.path == STDIN else expanded(source.path)
    is_data_set = source.path != STDIN and path.is_dir() and saved_to_disk(path)
    for setting in ("config", "revision") if is_data_set else ("config", "split", "revision"):
        if getattr(source, setting) is not None:
            raise ValueError(
                f"`{setting}` of {source.path} must be left out, got {getattr(source, setting)!r}: "
                f"it is of data sets of the hub; write `path: {HUB}org/name` for one"
            )
    if is_data_set:
        return saved_rows(path, source.split, use)
    return _rows_of_file(path, use)


def _rows_of_file(path: Path, use: FieldUse) -> Iterator[Row | RowError]:
    stdin = str(path) == STDIN
    name = "<stdin>" if stdin else str(path)
    if not stdin:
        _check_is_file(path)
    with _named(name), _stdin() if stdin else path.open("rb") as stream:
        head = stream.read(_HEAD)
        stream.seek(0)
        packed = head.startswith(GZIP_MAGIC)
        if packed:
            head = _unpacked_head(stream)
        kind = readable_kind(name, head, packed)
        if packed:
            with gzip.open(stream, "rb") as unpacked:
                yield from _rows_of_stream(name, cast(BinaryIO, unpacked), kind, use)
        else:
            yield from _rows_of_stream(name, stream, kind, use)


def _rows_of_stream(
    name: str, stream: BinaryIO, kind: str, use: FieldUse
) -> Iterator[Row | RowError]:
    if kind == "json":
        return json_rows(name, stream, use)
    return csv_rows(name, stream, use) if kind == "csv" else arrow_rows(name, stream, kind, use)


@contextmanager
def _stdin() -> Iterator[BinaryIO]:
    """Standard input as a file that can be read from any place, as tables have to be."""
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def _check_is_file(file: Path) -> None:
    if file.is_file():
        return
    if file.is_dir():
        found = "a folder, which no `save_to_disk` has written"
        cure = f"name a file in it, or all of them by '{file}/*'"
    elif file.exists():
        found, cure = "no regular file", f"write what it gives to a file, or pipe it into '{STDIN}'"
    else:
        found, cure = "not there", "check the path (a relative one starts at the working directory)"
    raise FileNotFoundError(
        f"`path` must be a data file, got {str(file)!r}, which is {found}; {cure}"
    )


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Let an error of the file system begin with the file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{file}: a data file must be readable, got {error}; mend that") from error


def _unpacked_head(stream: BinaryIO) -> bytes:
    """The first bytes of a gzip stream; none of a damaged one, whose reader says where it is."""
    try:
        with gzip.open(stream, "rb") as unpacked:
            return unpacked.read(_HEAD)
    except CUT_OFF:
        return b""
    finally:
        stream.seek(0)
