"""Runs in processes of their own: side by side, killed, stopped, and left by their sweep."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
from killed_runs import run_alone
from processes import fork_server

from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.trainer import train
from raco_fast.settings.parsing import from_settings
from raco_fast.settings.text import read
from raco_fast.studies import pool
from raco_fast.studies.plan import planned
from raco_fast.studies.sweep import sweep
from raco_fast.studies.worker import Ended

pytestmark = pytest.mark.slow
ENDLESS = {"max_steps": 10_000, "epochs": 10_000, "save_every": 2, "eval_data": []}


def pid_of(folder: Path) -> int:
    """Of the process that holds a run's folder, once it trains."""
    deadline = time.monotonic() + 120
    while latest(folder / "checkpoints") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(read(folder / ".lock", "lock")["process"])


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_runs_side_by_side_are_those_of_train_and_share_a_reference_pass(
    runs, make_sweep, base, tmp_path
):
    result = sweep(make_sweep(jobs=2))
    assert set(result.ends.values()) == {Ended("finished")}
    for run in result.runs:
        given = read(run.config.folder / "config.yaml")
        alone = from_settings(TrainConfig, given | {"output_dir": str(tmp_path / "a" / run.name)})
        train(alone)
        runs.assert_same_run(alone, run.config)
    # Of both sets of pairs a log-probability is needed in four runs, scored in one, read in three.
    logs = [(run.config.folder / "log.txt").read_text() for run in result.runs]
    assert sum(log.count("reference log-probabilities of") for log in logs) == 6
    assert len(list(Path(base["cache_dir"]).iterdir())) == 2


def test_a_process_that_is_killed_ends_its_run_alone(make_sweep):
    config = make_sweep(ENDLESS, grid={"max_steps": [10_000, 1]})
    victim = config.folder / "max_steps=10000"
    killer = Thread(target=lambda: os.kill(pid_of(victim), signal.SIGKILL))
    killer.start()
    result = sweep(config)
    killer.join()
    first, second = (result.end_of(run) for run in result.runs)
    assert second == Ended("finished")
    assert first.status == "failed"
    assert "was ended by SIGKILL: has memory run out? Lower `jobs`" in first.reason


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (3, Ended("failed", "its process ended with exit status 3; {log} says why")),
        (-signal.SIGSEGV, Ended("failed", "its process was ended by SIGSEGV; see {log}")),
        (-signal.SIGTERM, Ended("stopped", "before a checkpoint of it was written")),
    ],
)
def test_an_end_without_a_word_is_told_by_its_status(make_sweep, code, end):
    (run,) = planned(make_sweep(grid={"seed": [0]}))
    answers, sent = fork_server().Pipe(duplex=False)
    act = (os._exit, (code,)) if code > 0 else (signal.raise_signal, (-code,))
    process = fork_server().Process(target=act[0], args=act[1])
    process.start()
    sent.close()
    found = pool._end_of(pool._Job(run, 0, process, answers))
    log = run.config.folder / "log.txt"
    assert found == Ended(end.status, end.reason.format(log=log))


def stopped_sweep(config) -> tuple[bool, list[Ended]]:
    """A sweep in the main thread of a process without threads, which gets SIGTERM amid its runs."""
    first = config.folder / "seed=0"
    Thread(target=lambda: (pid_of(first), os.kill(os.getpid(), signal.SIGTERM))).start()
    result = sweep(config)
    return result.stopped, [result.end_of(run) for run in result.runs]


def test_a_signal_stops_every_run_with_a_checkpoint(make_sweep, tmp_path):
    config = make_sweep(ENDLESS, grid={"seed": [0, 1, 2]}, jobs=2)
    stopped, ends = run_alone(stopped_sweep, config, folder=tmp_path, timeout=170)
    assert stopped
    assert [end.status for end in ends] == ["stopped"] * 3
    assert ends[0].reason.startswith("after step")
    assert ends[2].reason == "not started"
    assert latest(config.folder / "seed=0" / "checkpoints") is not None
    assert is_gone(pid_of(config.folder / "seed=0"))


def left_sweep(config) -> None:
    """A sweep that is killed amid its runs."""
    first = config.folder / "seed=0"
    Thread(target=lambda: (pid_of(first), os.kill(os.getpid(), signal.SIGKILL))).start()
    sweep(config)


def test_runs_end_with_a_sweep_that_is_killed(make_sweep):
    config = make_sweep(ENDLESS, grid={"seed": [0]})
    process = fork_server().Process(target=left_sweep, args=(config,))
    process.start()
    process.join(170)
    assert process.exitcode == -signal.SIGKILL
    pid = pid_of(config.folder / "seed=0")
    deadline = time.monotonic() + 60
    while not is_gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_imported_before_the_fork_asks_no_gpu():
    """A process forked from one that has done so cannot use it."""
    code = f"""
import torch
def asked(*_, **__):
    raise AssertionError("a GPU is asked")
for name in ("is_available", "device_count", "_lazy_init", "get_device_capability"):
    setattr(torch.cuda, name, asked)
for name in {pool._IMPORTED_ONCE}:
    __import__(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
