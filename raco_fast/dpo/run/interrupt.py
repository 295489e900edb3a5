"""Ctrl-C and SIGTERM that wait for a safe place."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from raco_fast.dpo.launch import launched

_ONE_SIGNAL = 1.0  # seconds


class Interrupt:
    """Context in which the first Ctrl-C or SIGTERM sets `requested`; a second one raises at once.

    Signals can be handled in the main thread only; elsewhere the context changes nothing.

    A launcher passes signals on to its processes, to which the terminal may have sent them as well:
    under one, signals within a second are the same.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if launched() is not None and time.monotonic() - self._first < _ONE_SIGNAL:
                return
            raise KeyboardInterrupt
        self.requested, self._first = True, time.monotonic()
        # Straight to stderr's descriptor: the interrupted code may be inside a print of its own.
        os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops without saving\n")
