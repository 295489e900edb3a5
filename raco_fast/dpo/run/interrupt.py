"""Ctrl-C that waits for a safe place."""

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Context in which the first Ctrl-C sets `requested` and a second one raises at once.

    Signals can be handled in the main thread only; elsewhere the context changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Straight to stderr's descriptor: the interrupted code may be inside a print of its own.
        os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops without saving\n")
