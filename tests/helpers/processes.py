"""Run a function on several processes that form one gloo group, and hear what became of each.

    a, b = run(2, function, *args, folder=tmp_path)

Processes are forked from a server that has imported torch and transformers once and does nothing
else ("forkserver"). A launch then takes 0.13 s, where processes that import everything anew
("spawn") take 4 s. Forking the tests' own process would be as fast, but it has threads (of
pytest-xdist, of OpenMP), whose locks a fork copies as they are: the child may wait for one for
ever.

Everything goes through files in `folder`: the group's store, what a process returns, and where it
stands when time is up. So nothing is lost when a process is killed, and no port is needed.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

_IMPORTED_ONCE = [
    "pytest",
    "raco_fast.cli.program",
    "raco_fast.dpo.run.trainer",
    "jsonargparse",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "peft",
]


class Failed(NamedTuple):
    """A process that did not return: its error, or how it died."""

    kind: str  # the error's class, or "died"
    message: str
    where: str = ""  # the traceback


def run(
    world: int, function: Callable[..., Any], *args: Any, folder: Path, timeout: float = 60.0
) -> list[Any]:
    """What `function(*args)` returns on each of `world` processes, in the order of their ranks.

    Raises:
        AssertionError: a process failed; with the traceback of each that did.
        TimeoutError: as `outcomes`.
    """
    found = outcomes(world, function, *args, folder=folder, timeout=timeout)
    failed = [f"rank {rank}: {x.where or x}" for rank, x in enumerate(found) if type(x) is Failed]
    assert not failed, "\n".join(failed)
    return found


def outcomes(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    timeout: float = 60.0,
    group_timeout: float = 30.0,
) -> list[Any]:
    """As `run`, with a `Failed` in the place of what a failed process would have returned.

    Args:
        function: of a module that can be imported; on each process torch.distributed is initialised
            and torch has one thread.
        args: anything that can be pickled; results are pickled too.
        folder: where files may be written.
        timeout: seconds for all of it.
        group_timeout: seconds that a process waits for the others in a collective.
    Raises:
        TimeoutError: a process was still running; with the stacks of those that were.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    started: list[Any] = []
    try:
        for rank in range(world):
            given = (rank, world, place, group_timeout, function, args)
            started.append(fork_server().Process(target=_on_rank, args=given, daemon=True))
            started[-1].start()
        deadline = time.monotonic() + timeout
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        if running := [r for r, process in enumerate(started) if process.is_alive()]:
            stacks = [_stack(place, rank, started[rank].pid) for rank in running]
            raise TimeoutError(f"after {timeout:g} s still running: " + "\n".join(stacks))
        return [_outcome(place, rank, process.exitcode) for rank, process in enumerate(started)]
    finally:
        for process in started:
            process.kill()
            process.join()


def assert_all_failed(found: list[Any], kind: str, match: str) -> None:
    """Every process raised an error of this class, with words that the pattern finds."""
    for rank, outcome in enumerate(found):
        assert type(outcome) is Failed, f"rank {rank} returned {outcome}"
        assert outcome.kind == kind, f"rank {rank}: {outcome.where or outcome}"
        assert re.search(match, outcome.message), f"rank {rank}: {outcome.where}"


@cache
def fork_server() -> ForkServerContext:
    """Where processes are forked from; there is one server, whoever asks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


def _on_rank(
    rank: int, world: int, place: Path, seconds: float, function: Any, args: tuple[Any, ...]
) -> None:
    import torch

    gc.freeze()  # collecting what the server imported would take a third of a short test's time
    with (place / f"{rank}.stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a look-up of the host's name may wait for ever
        torch.set_num_threads(1)
        try:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{place}/store",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=seconds),
            )
            torch.distributed.barrier()  # one that ends at once is missed by those that connect
            outcome = function(*args)
            torch.distributed.destroy_process_group()
        except BaseException as error:  # noqa: BLE001 - pytest.fail's as well; the parent is told
            outcome = Failed(type(error).__name__, str(error), traceback.format_exc())
        written = place / f"{rank}.writing"
        written.write_bytes(pickle.dumps(outcome))
        written.rename(place / f"{rank}.outcome")
        os._exit(0)  # an error can leave collectives open that the interpreter would wait for


def _outcome(place: Path, rank: int, exit_code: int) -> Any:
    file = place / f"{rank}.outcome"
    if not file.exists():
        return Failed("died", f"exit code {exit_code}")
    return pickle.loads(file.read_bytes())


def _stack(place: Path, rank: int, pid: int) -> str:
    """Where a process stands, by its own report."""
    file = place / f"{rank}.stack"
    if file.exists():  # before that, the signal would end the process
        os.kill(pid, signal.SIGUSR1)
        for _ in range(100):
            time.sleep(0.02)
            if file.stat().st_size:
                break
    return f"rank {rank}\n{file.read_text() if file.exists() else 'not yet in its function'}"
