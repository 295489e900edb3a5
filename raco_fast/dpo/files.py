"""Files that are either complete or absent.

Whatever is written here is written beside its destination and renamed when it is whole, so that a
full disk, a crash or Ctrl-C leaves the previous version in place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends without an error."""
    partial = destination.with_name(f".partial-{destination.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        replaced = destination.with_name(f".replaced-{destination.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        if destination.exists():
            destination.rename(replaced)
        partial.rename(destination)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a path that becomes `destination` when the block ends without an error."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".partial-{destination.name}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, destination)
    finally:
        partial.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    """Force a written file to disk: a rename must not outrun the data it names."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
