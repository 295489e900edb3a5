"""One reference pass for runs that start together: the others wait, and read what it has cached.

Runs of a sweep have the same pairs and the same reference, and without this each of those that
start at the same time would compute what one of them computes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raco_fast.dpo.run.files import make_folder

logger = logging.getLogger(__name__)

_LOCK = ".lock"


@contextmanager
def turn(parts: Path) -> Iterator[None]:
    """Wait until no other run computes the log-probabilities whose parts lie in a folder.

    By `flock` on a file in it, which the kernel lets go of when its holder ends in whatever way.
    The folder goes when the values are cached: whoever still waits for the file that went with it
    has its turn then, and finds them. A signal ends the waiting, as it would end the pass. Where
    there is nothing to lock (a folder that cannot be written, a file system without locks), nobody
    waits and several may compute the same.
    """
    descriptor = _opened(parts)
    try:
        if descriptor is not None:
            _wait(descriptor, parts)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _opened(parts: Path) -> int | None:
    try:
        make_folder(parts)
        return os.open(parts / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # the cache says so itself, where it writes the values
        return None


def _wait(descriptor: int, parts: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return
        logger.info("reference: another run computes %s; waiting for it", parts.stem)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
