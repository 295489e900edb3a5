"""What a run tells while it goes on: the interface, and who is told.

Callbacks are called on the first process alone, with plain values that are theirs to keep. They see
a run and do not steer it: what is learnt is the same with and without them.

An exception in one ends the run, as what is learnt must not hang on whether somebody notices that
nothing is written any more; but no step is lost: a checkpoint is saved first, from which the run
goes on once the callback is mended or left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from raco_fast.dpo.run.metrics_file import is_evaluation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStart:
    """A run that is about to take its first step.

    Args:
        folder: `output_dir`.
        settings: dotted name -> value of every setting, as plain values.
        total_steps: optimizer steps of the whole run.
        resumed_at: steps that were done before; None of a new run. What was told of later ones, by
            the run that this one goes on from, is told again.
    """

    folder: Path
    settings: Mapping[str, Any]
    total_steps: int
    resumed_at: int | None


class Callback:
    """Told of a run's course; each method does nothing until it is overridden.

    A record is a line of metrics.jsonl: name -> number, None in place of one that is not finite,
    and `step`, the optimizer steps that are completed.
    """

    def on_start(self, run: RunStart) -> None:
        """Before the first evaluation and the first step."""

    def on_step(self, record: dict[str, Any]) -> None:
        """After every `log_every`-th step."""

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """After every evaluation; the names begin with `eval_`."""

    def on_save(self, folder: Path) -> None:
        """After a checkpoint was written to `folder`, whole."""

    def on_end(self, result: dict[str, Any] | None) -> None:
        """Once, after a start: when the model is saved, or when the run ends before that.

        Args:
            result: the last evaluation, empty without `eval_data`; None of a run that was stopped
                or has failed.
        """


class CallbackError(ValueError):
    """A callback has raised; its exception is the cause of this one."""


class Callbacks:
    """The callbacks of a run, in order; none on other processes than the first.

    Attributes:
        failure: of the first that has raised, until `check` raises it.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._all = list(callbacks)
        self._started: list[Callback] = []
        self.failure: CallbackError | None = None

    def start(self, run: RunStart) -> None:
        """Tell all that the run begins; CallbackError at the first that raises."""
        for callback in self._all:
            self._started.append(callback)  # also of one that fails, which may have begun something
            self._told(callback, "on_start", lambda callback: callback.on_start(run))
            self.check("nothing was trained")

    def record(self, record: Mapping[str, Any]) -> None:
        """Tell of a record as metrics.jsonl has it."""
        if is_evaluation(record):
            self._tell("on_evaluation", lambda callback: callback.on_evaluation(dict(record)))
        else:
            self._tell("on_step", lambda callback: callback.on_step(dict(record)))

    def saved(self, folder: Path) -> None:
        """Tell of a checkpoint."""
        self._tell("on_save", lambda callback: callback.on_save(folder))

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Tell all that have been told of the start."""
        copy = None if result is None else dict(result)
        self._tell("on_end", lambda callback: callback.on_end(copy))
        self._started = []

    def check(self, left: str) -> None:
        """Raise the failure that there is.

        Args:
            left: what is left of the run.
        Raises:
            CallbackError: names the callback, what it was told, its exception, and what is left.
        """
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise CallbackError(f"{failure}; {left}") from failure.__cause__

    def _tell(self, event: str, act: Callable[[Callback], None]) -> None:
        for callback in self._started:
            self._told(callback, event, act)

    def _told(self, callback: Callback, event: str, act: Callable[[Callback], None]) -> None:
        name = type(callback).__name__
        with _Caught(f"the callback {name} has failed in {event}") as caught:
            act(callback)
        if caught.failure is not None:
            logger.error("%s", caught.failure)
            self.failure = self.failure or caught.failure


class _Caught(AbstractContextManager["_Caught"]):
    """A block of somebody else's code, of which nobody knows what it raises."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.failure: CallbackError | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):  # Ctrl-C is no failure of the code that it meets
            return False
        said = " ".join(str(error).split())[:400]
        self.failure = CallbackError(f"{self._what}: {type(error).__name__}: {said}")
        self.failure.__cause__ = error
        return True
