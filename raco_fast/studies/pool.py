"""The runs of a sweep in processes, some at a time; one that fails or is killed ends alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

from raco_fast.dpo.run.interrupt import Interrupt
from raco_fast.studies.plan import Run
from raco_fast.studies.sweep_config import SweepConfig
from raco_fast.studies.worker import LOG, Ended, work

# By the process that the others are forked from: what a run imports by and by takes seconds. None
# of these may ask a GPU anything, which no process that is forked later could do again.
_IMPORTED_ONCE = ["raco_fast.studies.worker", "peft", "transformers.optimization"]
_IMPORTED_ONCE += [f"transformers.models.auto.{n}_auto" for n in ("modeling", "tokenization")]
_LOOK_EVERY = 0.2  # seconds between two looks for a signal


@dataclass
class _Job:
    run: Run
    slot: int
    process: BaseProcess
    answers: Connection


def ended(
    runs: Sequence[Run], sweep: SweepConfig, interrupt: Interrupt
) -> Iterator[tuple[Run, Ended]]:
    """Make runs, at most `sweep.jobs` at a time; (run, how it ended) in the order of their ends.

    Each has a process of its own, forked from one that has imported everything: it starts at once,
    and memory that runs out, or a library that aborts, ends one run.

    Args:
        interrupt: entered by the caller. Once it is `requested`, no run starts, and those that run
            are told to save a checkpoint and end.
    Raises:
        KeyboardInterrupt: a second signal; the runs end without saving.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    waiting, slots, told = list(runs), list(range(sweep.jobs)), False
    jobs: list[_Job] = []
    try:
        while jobs or (waiting and not interrupt.requested):
            while waiting and slots and not interrupt.requested:
                jobs.append(_started(context, waiting.pop(0), slots.pop(0), sweep))
            wait([job.process.sentinel for job in jobs], timeout=_LOOK_EVERY)
            if interrupt.requested and not told:
                told = True
                _tell(jobs)
            for job in [job for job in jobs if not job.process.is_alive()]:
                jobs.remove(job)
                slots.append(job.slot)
                yield job.run, _end_of(job)
    finally:
        _tell(jobs)
        for job in jobs:
            job.process.join()


def device_of(slot: int, sweep: SweepConfig) -> str | None:
    """The device of the run in a slot, of which there are `jobs`; None is that of its config."""
    return sweep.devices[slot % len(sweep.devices)] if sweep.devices else None


def _started(context: ForkServerContext, run: Run, slot: int, sweep: SweepConfig) -> _Job:
    answers, sent = context.Pipe(duplex=False)
    arguments = (run, device_of(slot, sweep), sweep.threads_of_each, sweep.keep, sent)
    process = context.Process(target=work, args=arguments, name=run.name)
    process.start()
    sent.close()  # so that an end without an answer is seen as one
    return _Job(run, slot, process, answers)


def _tell(jobs: Sequence[_Job]) -> None:
    """Ask every process to stop."""
    for job in jobs:
        if job.process.is_alive() and job.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(job.process.pid, signal.SIGTERM)


def _end_of(job: _Job) -> Ended:
    """What the process has said, or what its end says of it."""
    job.process.join()
    log = job.run.config.folder / LOG
    try:
        answer = job.answers.recv()
        assert isinstance(answer, Ended)
        return answer
    except EOFError:
        code = job.process.exitcode or 0
        if code >= 0:
            return Ended("failed", f"its process ended with exit status {code}; {log} says why")
        if -code == signal.SIGTERM:  # before it could listen
            return Ended("stopped", "before a checkpoint of it was written")
        cause = signal.Signals(-code).name
        cure = ": has memory run out? Lower `jobs`" if -code == signal.SIGKILL else ""
        return Ended("failed", f"its process was ended by {cause}{cure}; see {log}")
    finally:
        job.answers.close()
