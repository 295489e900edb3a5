"""Commands side by side, until a deadline: tests and memory checkers, before anything is timed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from bench.harness.machine import ROOT


@dataclass(frozen=True)
class Done:
    """`code` is the exit status, None where the deadline came first."""

    code: int | None
    output: str
    seconds: float


def run_together(
    commands: Mapping[str, Sequence[str]], environment: Mapping[str, str], until: float
) -> dict[str, Done]:
    """Run all commands at the same time in the checkout's root.

    Args:
        commands: name -> command line.
        environment: variables besides those of this process.
        until: the `perf_counter` at which those that still run are killed.
    """
    started = perf_counter()
    running, done = {}, {}
    with TemporaryDirectory() as folder:
        for number, (name, command) in enumerate(commands.items()):
            log = Path(folder) / str(number)
            with log.open("wb") as output:
                # A session of its own, so that a command is killed with all that it started.
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            running[name] = (process, log)
        for name, (process, log) in running.items():
            try:
                code: int | None = process.wait(max(0.0, until - perf_counter()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
            text = log.read_text(encoding="utf-8", errors="replace")
            done[name] = Done(code, text, perf_counter() - started)
    return done
