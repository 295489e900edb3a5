"""Files that are either complete or absent, whenever the process or the machine stops.

Whatever is written here is written beside its destination, forced to disk, and renamed when it is
whole. A process that is killed can leave behind, beside what it was writing:

    .partial-<name>     not whole
    .replaced-<name>    the version before, for the moment between two renames
    .removed-<name>     on its way out

`clear_leftovers` takes them away, and puts back a replaced version whose successor never came.
"""

import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `destination` when the block ends without an error.

    One writer at a time: of the folder around it, see `raco_fast.dpo.run.lock`.

    Raises:
        OSError: it could not be written whole; what `destination` held before is there as it was.
    """
    partial, replaced = (_beside(destination, state) for state in ("partial", "replaced"))
    with reported(destination):
        try:
            make_folder(destination.parent)
            _put_back(replaced)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            _sync_tree(partial)
            if destination.exists():
                os.rename(destination, replaced)
            os.rename(partial, destination)
            sync(destination.parent)
        finally:
            _put_back(replaced)
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a path that becomes `destination` when the block ends without an error.

    Several processes may write the same file: each writes its own, and the last to end stays.

    Raises:
        OSError: as `atomic_folder`.
    """
    machine = f".partial-{socket.gethostname()}-"
    partial = destination.with_name(f"{machine}{os.getpid()}-{destination.name}")
    with reported(destination):
        try:
            make_folder(destination.parent)
            _clear_dead(destination, machine)
            yield partial
            sync(partial)
            os.replace(partial, destination)
            sync(destination.parent)
        finally:
            with suppress(OSError):  # what went wrong before is what there is to tell
                partial.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; under its name it is there whole or not at all.

    What cannot be deleted stays as `.removed-<name>` until `clear_leftovers` tries again: a file
    that somebody holds open on NFS is no reason to end a run.

    Raises:
        OSError: it could not be renamed.
    """
    removed = _beside(folder, "removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Finish or undo what a process that was killed has left in `folder`.

    Nobody else may be writing there.
    """
    for replaced in folder.glob(".replaced-*"):
        _put_back(replaced)
    for left in (*folder.glob(".partial-*"), *folder.glob(".removed-*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


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


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, which are there after a power cut too."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to disk.

    After a power cut a file that was renamed before it was on disk can be empty, and a rename whose
    folder was not can be undone.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # A folder may be one to write but not to read in, or on a network that keeps names itself.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _beside(destination: Path, state: str) -> Path:
    return destination.with_name(f".{state}-{destination.name}")


def _put_back(replaced: Path) -> None:
    """A replaced version takes its name again, or goes where that has a new one."""
    destination = replaced.with_name(replaced.name.removeprefix(".replaced-"))
    if destination.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        os.rename(replaced, destination)


def _clear_dead(destination: Path, machine: str) -> None:
    """Remove what processes of this machine that no longer run were writing to a file."""
    pattern = f"{glob.escape(machine)}*-{glob.escape(destination.name)}"
    for left in destination.parent.glob(pattern):
        pid = left.name.removeprefix(machine).removesuffix(f"-{destination.name}")
        if pid.isdecimal() and not _runs(int(pid)):
            left.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True
