"""Rows of Parquet and Arrow tables, read by pyarrow a batch at a time."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from raco_fast.dpo.data.extra import needed
from raco_fast.dpo.data.field_use import Fields, FieldUse
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import show

_ROWS = 1024  # of a batch: what is in memory at once


def arrow_rows(file: str, stream: BinaryIO, kind: str, use: FieldUse) -> Iterator[Row]:
    """Yield the rows of a table in order; messages name them by their number, from 1.

    Args:
        file: its name, for messages.
        stream: that can be read from any place.
        kind: "parquet", "arrow" (a file, as Feather is) or "arrow-stream".
        use: notes which fields are read.
    Raises:
        ValueError: pyarrow is not installed; a damaged table; two columns of one name.
    """
    pyarrow = needed("pyarrow", file)
    number = 0
    try:
        for batch in _batches(pyarrow, stream, kind):
            _check_names(file, batch.schema.names)
            for values in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield Row(f"{file}:{number}", number, Fields(values, use), use)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: a table must be complete, got an error behind row {number} "
            f"({str(error).splitlines()[0]}); copy or write it again"
        ) from error


def _batches(pyarrow: Any, stream: BinaryIO, kind: str) -> Iterator[Any]:
    if kind == "parquet":
        from pyarrow.parquet import ParquetFile

        yield from ParquetFile(stream).iter_batches(batch_size=_ROWS)
    elif kind == "arrow":
        reader = pyarrow.ipc.open_file(stream)
        yield from (reader.get_batch(k) for k in range(reader.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(stream)


def _check_names(file: str, names: list[str]) -> None:
    twice = next((name for k, name in enumerate(names) if name in names[:k]), None)
    if twice is not None:
        raise ValueError(
            f"{file}: the names of a table's columns must be distinct, got {show(twice)} again; "
            f"only one of the two could be read: rename or remove one"
        )
