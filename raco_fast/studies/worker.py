"""What a process does for one run of a sweep: train it, and say how that ended."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

import torch

from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.divergence import DivergedError
from raco_fast.dpo.run.files import make_folder
from raco_fast.dpo.run.trainer import Interrupted, train
from raco_fast.studies.finished import write_finished
from raco_fast.studies.plan import Run

LOG = "log.txt"
Status = Literal["finished", "failed", "stopped"]


@dataclass(frozen=True)
class Ended:
    """How a run has ended, and, unless it is finished, why."""

    status: Status
    reason: str = ""


def work(run: Run, device: str | None, threads: int, keep: str, answers: Connection) -> None:
    """Make a run in this process, which is there for it alone, and send how it `Ended`.

    What it prints goes to `log.txt` in its folder. Ctrl-C in the terminal does not reach it: the
    sweep passes on SIGTERM, at which it saves a checkpoint and ends, as it does where the sweep is
    killed. An error that `raco-fast train` does not explain ends the process with its traceback in
    the log, and nothing is sent.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _end_with_parent()
    torch.set_num_threads(threads)
    answers.send(_made(run, device, threads, keep))


def _made(run: Run, device: str | None, threads: int, keep: str) -> Ended:
    config = run.config
    try:
        if device is not None:
            config = _on(device, config)
        make_folder(config.folder)
        _print_into(config.folder / LOG)
        run.write_config()
        train(config, resume=latest(config.folder / "checkpoints") is not None)
        write_finished(config, threads)
        _drop(config.folder, keep)
    except Interrupted as stop:
        return Ended("stopped", f"after step {stop.step}, with a checkpoint")
    except KeyboardInterrupt:
        return Ended("stopped", "before a checkpoint of it was written")
    except (ValueError, OSError, MemoryError, DivergedError) as error:
        return Ended("failed", str(error))
    return Ended("finished")


def _on(device: str, config: TrainConfig) -> TrainConfig:
    return replace(config, model=replace(config.model, device=device))


def _drop(folder: Path, keep: str) -> None:
    """Remove what a finished run is not to keep; `finished.json` is there before."""
    dropped = {"all": (), "model": ("checkpoints",), "metrics": ("checkpoints", "model", "base")}
    for name in dropped[keep]:
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def _print_into(file: Path) -> None:
    """Let the process, with the libraries in C, print to a file."""
    with file.open("ab") as opened:
        for descriptor in (1, 2):
            os.dup2(opened.fileno(), descriptor)
    logging.basicConfig(format="raco-fast: %(message)s", force=True)
    logging.getLogger("raco_fast").setLevel(logging.INFO)


def _end_with_parent() -> None:
    """Stop as at Ctrl-C when the sweep is gone: nobody would know that the run goes on."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
