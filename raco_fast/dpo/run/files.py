"""Files that are either complete or absent.

Whatever is written here is written beside its destination and renamed when it is whole, so that a
full disk, a crash or Ctrl-C leaves the previous version in place.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends without an error.

    Raises:
        OSError: it could not be written whole; what `destination` held before is there as it was.
    """
    partial = destination.with_name(f".partial-{destination.name}")
    replaced = destination.with_name(f".replaced-{destination.name}")
    with reported(destination):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _flush(file)
            shutil.rmtree(replaced, ignore_errors=True)
            if destination.exists():
                destination.rename(replaced)
            partial.rename(destination)
        finally:
            if replaced.exists() and not destination.exists():
                replaced.rename(destination)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a path that becomes `destination` when the block ends without an error.

    Two processes may write the same file: each writes its own, and the last to end stays.

    Raises:
        OSError: as `atomic_folder`.
    """
    partial = destination.with_name(f".partial-{os.getpid()}-{destination.name}")
    with reported(destination):
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _flush(partial)
            os.replace(partial, destination)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def reported(destination: Path) -> Iterator[None]:
    """Name what is being written in what goes wrong; safetensors has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{destination} could not be written ({error}); "
            "nothing that was there before is lost: free some space or check the folder's rights"
        ) from error


def _flush(file: Path) -> None:
    """Force a written file to disk: after a power cut the renamed file could be empty."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
