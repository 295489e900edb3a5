"""The command `raco-fast` on several processes, with the environment that torchrun gives them.

    with Started(("train", config_file), processes=2, folder=tmp_path) as started:
        assert_done(started.end())

Processes are forked from a server that has imported torch and transformers once: a launch takes a
tenth of a second, where torchrun's takes seconds for each. What each prints goes to a file.
"""

import logging
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from processes import fork_server


class Ended(NamedTuple):
    """A process that has ended."""

    status: int  # negative: the signal that ended it
    printed: str  # stdout and stderr


class Started:
    """Processes of one launch; a context that ends those that still run.

    Args:
        limits: rank -> bytes beyond which no file of it may grow, as on a full disk.
        of_ranks: rank -> arguments of its own.
    """

    def __init__(
        self,
        arguments: tuple[str, ...],
        processes: int,
        folder: Path,
        limits: Mapping[int, int] | None = None,
        of_ranks: Mapping[int, tuple[str, ...]] | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=folder, prefix="printed-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for rank in range(processes):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            limit = (limits or {}).get(rank, resource.RLIM_INFINITY)
            own = (of_ranks or {}).get(rank, arguments)
            given = (own, variables, self._folder / f"{rank}.txt", limit)
            self.processes.append(fork_server().Process(target=_command, args=given, daemon=True))
            self.processes[-1].start()

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def printed(self, rank: int) -> str:
        """What a process has printed so far."""
        file = self._folder / f"{rank}.txt"
        return file.read_text() if file.exists() else ""

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one process."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_for_lines(self, file: Path, n: int, timeout: float = 60.0) -> None:
        """Until a file has n lines; AssertionError if all processes end before."""
        until = time.monotonic() + timeout
        while not (file.exists() and file.read_text().count("\n") >= n):
            running = any(process.is_alive() for process in self.processes)
            assert running, self.all_printed()
            assert time.monotonic() < until, self.all_printed()
            time.sleep(0.005)

    def end(self, timeout: float = 60.0) -> list[Ended]:
        """Wait for all of them; AssertionError, with what they have printed, if one does not."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        running = [r for r, process in enumerate(self.processes) if process.is_alive()]
        assert not running, f"still running: {running}\n{self.all_printed()}"
        found = []
        for rank, process in enumerate(self.processes):
            assert process.exitcode is not None
            found.append(Ended(process.exitcode, self.printed(rank)))
        return found

    def all_printed(self) -> str:
        """What all have printed, for a failing test."""
        return "\n".join(f"rank {r}: {self.printed(r)}" for r in range(len(self.processes)))


def assert_done(ended: list[Ended]) -> None:
    """All processes have ended with status 0."""
    assert [process.status for process in ended] == [0] * len(ended), ended


def _command(
    arguments: tuple[str, ...], variables: dict[str, object], printed: Path, limit: int
) -> None:
    """In the process: what torchrun would start."""
    import torch

    from raco_fast.cli import program as cli

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    logging.getLogger().handlers.clear()
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a look-up of the host's name may wait for ever
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(cli.main(arguments))
