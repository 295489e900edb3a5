"""A function of many items, computed by processes of their own.

Not by those of `multiprocessing`: each of them runs the user's script anew, and where that begins a
training without `if __name__ == "__main__"`, begins another training; at a Ctrl-C each prints a
traceback; and where their parent is killed they wait for ever. These are started with the
interpreter and two pipes, know nothing of the script, belong to no terminal, and end when their
input does, which the system sees to.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Its file, and not the module: what a function does not need is not imported.
_FILE = str(Path(__file__).with_name("worker_main.py"))
_BEGIN = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_path({file!r}, run_name='__main__')"
# One thread each: as many processes are started as there are cores.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
_ENVIRONMENT = {**_ONE_THREAD, "TOKENIZERS_PARALLELISM": "false"}


def mapped(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """function(item) for each item, in their order.

    Close the iterator, which ends the workers, where it may be left before its end.

    Args:
        function, items: can be pickled, if there are workers; the function by the name of its
            module, which is not to be `__main__`.
        workers: processes; 0 computes here, as `map` does.
    Raises:
        ValueError: that of the first item for which the function raises one.
        ChildProcessError: a worker has ended. What else the function may raise ends it: its
            traceback is on stderr.
    """
    if not workers:
        yield from map(function, items)
        return
    started: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()
    threads = ThreadPoolExecutor(workers, thread_name_prefix="raco_fast worker")

    def ask(item: Item) -> Result:
        worker = idle.get()
        try:
            return worker.ask(item)  # type: ignore[no-any-return]
        finally:
            idle.put(worker)

    try:
        pickled = pickle.dumps(function)
        for _ in range(workers):
            started.append(_Worker(pickled, workers))
            idle.put(started[-1])
        yield from threads.map(ask, items)
    finally:
        for worker in started:
            worker.kill()
        threads.shutdown(cancel_futures=True)
        for worker in started:
            worker.close()


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, function: bytes, of: int) -> None:
        self._function, self._of = function, of
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN.format(path=sys.path, file=_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # a Ctrl-C in the terminal is for the parent
        )

    def ask(self, item: Any) -> Any:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        try:
            to.write(self._function)  # before the first item
            self._function = b""
            pickle.dump(item, to, pickle.HIGHEST_PROTOCOL)
            to.flush()
            failure, result = pickle.load(back)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            status = self._process.wait()
            raise ChildProcessError(
                f"one of {self._of} worker processes has ended with status {status}"
                f"{' (killed, for want of memory perhaps)' if status == -9 else ''}; "
                f"what it had to say is above. Lower `workers`, or set it to 0"
            ) from None
        if failure is not None:
            raise failure
        return result

    def kill(self) -> None:
        """Whatever it is doing; a thread that waits for its answer finds that there is none."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Its pipes, once no thread uses them."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of what it has not read
                pipe.close()
