"""Processes until a deadline: tests and memory checkers side by side, what is measured alone."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from bench.harness.machine import ROOT

LEFT_OUT = "left out: the time for this part was used up"


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


def measured(
    arguments: Sequence[str], until: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What one process of this Python measures.

    Returns:
        The object of the last line of JSON that it prints, or {"failure": why there is none}.
    """
    done = run_together({"it": [sys.executable, *arguments]}, environment or {}, until)["it"]
    said = [line for line in done.output.splitlines() if line.startswith('{"')]
    if done.code == 0 and said:
        return dict(json.loads(said[-1]))
    if done.code is None:
        return {"failure": LEFT_OUT}
    return {"failure": f"status {done.code}: {done.output.strip()[-400:]}"}
