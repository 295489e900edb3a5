"""Runs of `raco-fast train` and single saves that are killed at a chosen moment.

Each is forked from a process that has imported everything and has no threads, which takes a
hundredth of a second. That process itself comes from the tests' fork server (`processes.py`).
"""

import itertools
import logging
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from processes import fork_server

# What changes a folder; between two of these a crash finds the same names.
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
_TIMING = ("seconds", "tokens_per_second")


def run_alone(function: Callable[..., Any], *args: Any, folder: Path, timeout: float) -> Any:
    """What `function(*args)` returns in a process without threads.

    Raises:
        AssertionError: it failed (with its traceback), or time was up.
    """
    outcome = folder / "outcome"
    process = fork_server().Process(target=_report, args=(outcome, function, args))
    process.start()
    process.join(timeout)
    running = process.is_alive()
    process.kill()
    process.join()
    assert not running, f"still running after {timeout:g} s"
    result, failure = pickle.loads(outcome.read_bytes())
    assert failure is None, failure
    return result


def _report(outcome: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is one of processes, which a killed one leaves behind
    result = failure = None
    try:
        result = function(*args)
    finally:
        if sys.exc_info()[0] is not None:
            failure = traceback.format_exc()
        outcome.write_bytes(pickle.dumps((result, failure)))


def forked(
    function: Callable[[], Any],
    printed: Path,
    at_call: tuple[int, Path] | None = None,
    after: float | None = None,
) -> int:
    """The exit status of a fork of this process in which `function` runs.

    Args:
        printed: file that what it prints is added to.
        at_call: (n, folder): kill it before its n-th call, from 0, that changes names of files or
            opens one in the folder.
        after: kill it after so many seconds.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            logging.getLogger().handlers.clear()
            if at_call is not None:
                _kill_at_call(*at_call)
            status = int(function() or 0)
        finally:  # whatever happens, this fork goes no further
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill_at_call(n: int, folder: Path) -> None:
    calls = itertools.count()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and str(args[0]).startswith(str(folder))
        if (opened or event in _CHANGES) and next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def content(folder: Path) -> dict[str, Any]:
    """What a finished run leaves, without what a clock says."""
    from raco_fast.dpo.run.metrics_file import read_records

    records = read_records(folder / "metrics.jsonl")
    return {
        "metrics": [{k: v for k, v in r.items() if k not in _TIMING} for r in records],
        "model": (folder / "model" / "model.safetensors").read_bytes(),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "files": sorted(path.name for path in folder.iterdir()),
    }


class Undisturbed:
    """A run that nothing disturbs, and what others of the same config are held against.

    Args:
        config: file of settings.
        folder: where the outputs go.
    """

    def __init__(self, config: Path, folder: Path) -> None:
        self._config, self._folder, self._printed = config, folder, folder / "printed"
        whole = folder / "whole"
        self.train(whole)  # fills the reference cache, as the disturbed ones will find it
        shutil.rmtree(whole)
        began = time.monotonic()
        self.train(whole)
        self.seconds = time.monotonic() - began
        self._content = content(whole)

    def train(self, output: Path, **kill: Any) -> int:
        """One start of the command, with --resume if there is a checkpoint; its exit status."""
        from raco_fast.cli import program as cli
        from raco_fast.dpo.run.checkpoint import latest

        resume = ["--resume"] if latest(output / "checkpoints") else []
        command = ["train", str(self._config), "--output_dir", str(output), *resume]
        return forked(lambda: cli.main(command), self._printed, **kill)

    def assert_same(self, output: Path, about: object) -> None:
        """Let a disturbed run come to its end, which must be this one's to the bit."""
        assert self.train(output) == 0, f"{about}: {self._printed.read_text()}"
        found = content(output)
        for what, expected in self._content.items():
            assert found[what] == expected, f"{about}: {what}"
        shutil.rmtree(output)


def killed_at_moments(config: Path, folder: Path, moments: int, of_one: int, seed: int) -> int:
    """Kill runs at so many random moments, each up to `of_one` times; how many runs it took."""
    undisturbed, draw, output = Undisturbed(config, folder), random.Random(seed), folder / "cut"
    left, runs = moments, 0
    while left:
        for _ in range(min(of_one, left)):
            status = undisturbed.train(output, after=draw.uniform(0, undisturbed.seconds))
            if status == 0:  # it has come to its end before
                break
            assert status == -signal.SIGKILL, status
            left -= 1
        undisturbed.assert_same(output, f"run {runs}")
        runs += 1
    return runs


def killed_at_calls(config: Path, folder: Path, first: int, every: int) -> int:
    """Kill runs before the calls first, first + every, ... that change their folder; how many."""
    undisturbed, output = Undisturbed(config, folder), folder / "disturbed"
    for n in itertools.count(first, every):
        status = undisturbed.train(output, at_call=(n, output))
        if status == 0:
            return n // every
        assert status == -signal.SIGKILL, status
        undisturbed.assert_same(output, f"killed before call {n}")
    raise AssertionError


def saves_killed_at_every_call(folder: Path) -> int:
    """Kill a checkpoint's writing before each call likewise, beside an older one and over itself.

    After each kill, once the folder is claimed again, it has whole checkpoints and nothing else;
    how many kills there were.
    """
    old, new, evaluated = (1, None), (2, None), (2, {"data": "x", "losses": {}})
    return _saves_killed(folder, old, new) + _saves_killed(folder, new, evaluated)


def _saves_killed(folder: Path, before: tuple[int, Any], after: tuple[int, Any]) -> int:
    from raco_fast.distributed.processes import Processes
    from raco_fast.dpo.run.lock import held

    run, start = folder / "run", folder / "start"
    whole = []
    for state in (after, before):
        shutil.rmtree(start, ignore_errors=True)
        _save(run, *state)
        whole.append(_trees(run))
        run.rename(start)
    for n in itertools.count():
        shutil.copytree(start, run)
        status = forked(lambda: _save(run, *after), folder / "printed", at_call=(n, run))
        assert status in (0, -signal.SIGKILL), (folder / "printed").read_text()
        with held(run, Processes()):
            assert _trees(run) in (*whole, whole[1] | whole[0]), f"killed before call {n}"
            _save(run, *after)
            assert _trees(run) == whole[0], f"killed before call {n}"
        shutil.rmtree(run)
        if status == 0:
            shutil.rmtree(start)
            return n
    raise AssertionError


def _save(run: Path, step: int, evaluation: dict[str, Any] | None) -> None:
    """Save a state that `step` defines, as a run does that keeps one checkpoint."""
    import torch

    from raco_fast.dpo.run.checkpoint import TrainingState
    from raco_fast.dpo.run.keeping import Checkpoints
    from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

    torch.manual_seed(step)
    model = torch.nn.Linear(3, 2)
    optimizer = ClippedCAGradAdamW(model.parameters(), weights={"a": 1.0}, c=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.backward({"a": model(torch.ones(1, 3)).square().sum()})
    optimizer.step()
    state = TrainingState(model, optimizer, scheduler, {}, step, evaluation)
    config = SimpleNamespace(folder=run, keep=1, save_minutes=None)
    Checkpoints(config, state, best=None).save()  # type: ignore[arg-type]


def _trees(run: Path) -> dict[str, dict[str, bytes]]:
    """What there is beside checkpoints too: name of a folder -> its files."""
    found: dict[str, dict[str, bytes]] = {}
    for path in (run / "checkpoints").iterdir():
        files = [file for file in path.rglob("*") if file.is_file()]
        found[path.name] = {str(file.relative_to(path)): file.read_bytes() for file in files}
    return found
