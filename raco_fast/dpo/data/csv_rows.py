"""Rows of a CSV table, or one with tabs or semicolons: a header line and a record for each row.

A cell is text, and nothing is guessed of it: "null", "N/A" and "nan" are the words they are. Where
a format asks for a number, or for turns, the cell has to spell it as JSON does (`Cell`). An empty
cell is null.
"""

import csv
import io
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

from raco_fast.dpo.data.field_use import Fields, FieldUse
from raco_fast.dpo.data.json_rows import CUT_OFF, cut_off
from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.dpo.data.values import Cell, show

_MARKS = ",\t;"
_LONGEST = 2**31 - 1  # characters of a cell; Python's own limit is 131,072, less than some prompts


def csv_rows(file: str, stream: BinaryIO, use: FieldUse) -> Iterator[Row | RowError]:
    """Yield the rows of a table in order; a record of another length as the error that says so.

    Args:
        file: its name, for messages.
        stream: UTF-8, with or without a byte-order mark. What divides the header's names, a comma,
            a tab or a semicolon, divides all cells.
        use: notes which fields are read.
    Raises:
        ValueError: a header with one name twice, a quote that is not closed, text that is not
            UTF-8, a damaged gzip stream; names the line.
    """
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    csv.field_size_limit(_LONGEST)
    number = before = 0
    try:
        header = lines.readline()
        mark = max(_MARKS, key=header.count)
        records = csv.reader(chain([header], lines), delimiter=mark, strict=True)
        names = _names(file, next(records, []))
        before = records.line_num
        for record in records:
            number += 1
            where = f"{file}:{before + 1}"
            before = records.line_num
            if len(record) != len(names):
                yield RowError(
                    f"{where}: a row must have a cell for each of the header's {len(names)} names, "
                    f"got {len(record)}; quote cells that hold {show(mark)} or a line's end"
                )
                continue
            cells = (Cell(cell) if cell else None for cell in record)
            yield Row(where, number, Fields(dict(zip(names, cells, strict=True)), use), use)
    except csv.Error as error:
        raise ValueError(
            f"{file}:{records.line_num}: a table must be CSV with doubled quotes inside quotes, "
            f"got an error ({error}); write it again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}:{before + 1}: text must be UTF-8, got byte "
            f"0x{error.object[error.start]:02x} there or soon after; convert the file"
        ) from error
    except CUT_OFF as error:
        raise ValueError(cut_off(f"{file}:{before + 1}", error)) from error
    finally:
        lines.detach()  # the stream is its opener's to close


def _names(file: str, header: list[str]) -> list[str]:
    twice = next((name for k, name in enumerate(header) if name in header[:k]), None)
    if twice is not None:
        raise ValueError(
            f"{file}:1: the names of a header must be distinct, got {show(twice)} again; only one "
            f"of the two columns could be read: rename or remove one"
        )
    return header
