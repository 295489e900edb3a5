"""Ctrl-C, SIGTERM and their kin that wait for a safe place."""

import os
import signal
import stat
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from raco_fast.dpo.launch import launched

_ONE_SIGNAL = 1.0  # seconds
# SIGUSR1 is the warning that SLURM sends before the end of a job's time (--signal=USR1@300), SIGHUP
# what a terminal that is closed sends. Both would end the process if nobody listened.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Interrupt:
    """Context in which the first of `_SIGNALS` sets `requested`; a second one raises.

    Signals can be handled in the main thread only; elsewhere the context changes nothing. A hangup
    that is ignored, as under nohup, stays so.

    A launcher passes signals on to its processes, to which the terminal may have sent them as well:
    under one, signals within a second are the same.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: by a library in C, whose handler Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if launched() is not None and time.monotonic() - self._first < _ONE_SIGNAL:
                return
            raise KeyboardInterrupt
        self.requested, self._first = True, time.monotonic()
        if number == signal.SIGHUP:
            _leave_terminal()
        # Straight to stderr's descriptor: the interrupted code may be inside a print of its own.
        with suppress(OSError):  # a terminal that is gone
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops without saving\n")


def _leave_terminal() -> None:
    """What is printed to a terminal that is gone would be an error, and end the run unsaved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # which a terminal that is gone still is
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
