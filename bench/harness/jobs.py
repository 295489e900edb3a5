"""Processes until a deadline: tests and memory checkers side by side, what is measured alone."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory, TemporaryFile
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


def run(command: Sequence[str], until: float, **environment: str) -> Done:
    """Run a command in the checkout's root.

    Args:
        command: its words.
        until: the `perf_counter` at which it is killed, with all that it started.
        environment: variables besides those of this process.
    """
    started = perf_counter()
    with TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, that can be killed as a whole
        )
        code = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(max(0.0, until - perf_counter()))
        finally:  # also after Ctrl-C, which reaches this process only
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Done(code, text, perf_counter() - started)


def run_together(
    commands: Mapping[str, Sequence[str]], until: float, **environment: str
) -> dict[str, Done]:
    """Run commands, each with a name, at the same time; otherwise as `run`."""
    with ThreadPoolExecutor(len(commands)) as pool:
        done = pool.map(lambda command: run(command, until, **environment), commands.values())
        return dict(zip(commands, done, strict=True))


def measured(arguments: Sequence[str], until: float, **environment: str) -> dict[str, Any]:
    """What one process of this Python measures.

    Returns:
        The object of the last line of JSON that it prints, or {"failure": why there is none}.
    """
    return _said(run([sys.executable, *arguments], until, **environment))


def measured_together(
    arguments: Sequence[str], processes: int, until: float, **environment: str
) -> list[dict[str, Any]]:
    """What each of several processes measures that form one group; otherwise as `measured`.

    Args:
        arguments: each gets its number and the file where they meet behind them: --rank, --store.
    """
    with TemporaryDirectory() as folder:
        command = [sys.executable, *arguments, "--store", f"{folder}/store", "--rank"]
        commands = {str(rank): [*command, str(rank)] for rank in range(processes)}
        return [*map(_said, run_together(commands, until, **environment).values())]


def _said(done: Done) -> dict[str, Any]:
    said = [line for line in done.output.splitlines() if line.startswith('{"')]
    if done.code == 0 and said:
        return dict(json.loads(said[-1]))
    if done.code is None:
        return {"failure": LEFT_OUT}
    return {"failure": f"status {done.code}: {done.output.strip()[-400:]}"}
