"""One run at a time in an output folder."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.run.files import clear_leftovers, make_folder
from raco_fast.dpo.run.together import by_first

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def held(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold `folder` for the run of `processes`, and clear what a killed one left half-written.

    The first process holds it, by `flock` on `folder/.lock`: the kernel lets go of it when the
    process ends in whatever way, so that a resumed run never meets the lock of a dead one. Over NFS
    it holds between machines too, where the server has locks; of a machine that has crashed, the
    server forgets them a minute or two later. The file stays: who removes a lock's file can remove
    the one that the next process has just locked.

    Raises:
        ValueError: another run holds it (named: process and machine).
        OSError: the folder cannot be made or written to.
        OtherProcessError: one of these, on a process that is not the first.
    """
    descriptor = by_first(processes, lambda: _claim(folder))
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _claim(folder: Path) -> int:
    """Lock and clear the folder; the open file that has the lock."""
    file = folder / _LOCK
    try:
        make_folder(folder)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(
            f"`output_dir` must be a folder that can be written, got {folder} ({error}); check "
            f"its rights or choose another one"
        ) from error
    with ExitStack() as unless_held:
        unless_held.callback(os.close, descriptor)
        _lock(descriptor, folder)
        clear_leftovers(folder)
        clear_leftovers(folder / "checkpoints")
        unless_held.pop_all()
    return descriptor


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            logger.warning(
                "`output_dir` %s is on a file system without locks (%s): nothing but you can see "
                "to it that no second run uses it at the same time",
                folder,
                error.strerror,
            )
            return
        raise ValueError(
            f"`output_dir` {folder} is in use by {_holder(descriptor)}; wait for the end of that "
            f"run or stop it, or choose another `output_dir`"
        ) from error
    content = json.dumps({"process": os.getpid(), "machine": socket.gethostname()})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content.encode(), 0)


def _holder(descriptor: int) -> str:
    """Who says to hold the lock; it may just be about to say so."""
    try:
        who = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {who['process']} on {who['machine']}"
    except (ValueError, LookupError, TypeError):
        return "another process"
