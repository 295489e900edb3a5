"""Callbacks that hand a run's metrics to TensorBoard, Weights & Biases or MLflow.

Where a run goes, to which project or server, is said by the variables of the environment that these
programs have for it (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ...).

A run that goes on is the same run there: its name is kept in `output_dir`. The steps between its
last checkpoint and its end are told twice, with the same values.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raco_fast.dpo.run.callbacks import Callback, RunStart
from raco_fast.dpo.run.files import atomic_file, reported

_PROJECT = "raco-fast"  # where the environment names none
# Limits of MLflow's servers: parameters in a request, characters of a parameter.
_AT_ONCE, _LONGEST = 100, 500


class TensorBoard(Callback):
    """Event files in `output_dir/tensorboard`."""

    _writer: Any = None

    def on_start(self, run: RunStart) -> None:
        """Open the files; what they have of later steps than those done is forgotten."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run.folder / "tensorboard"
        first = 0 if run.resumed_at is None else run.resumed_at + 1
        with reported(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=first)

    def on_step(self, record: dict[str, Any]) -> None:
        """Write the numbers."""
        with reported(self._folder):
            for name, value in _numbers(record):
                self._writer.add_scalar(name, value, record["step"])

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """As of a step."""
        self.on_step(record)

    def on_save(self, folder: Path) -> None:
        """Write what is held in memory."""
        with reported(self._folder):
            self._writer.flush()

    def on_end(self, result: dict[str, Any] | None) -> None:
        """Close the files."""
        if self._writer is not None:
            with reported(self._folder):
                self._writer.close()


class WandB(Callback):
    """A run of Weights & Biases; its files are in `output_dir/wandb`."""

    NOTE = "wandb_run.txt"
    _run: Any = None

    def on_start(self, run: RunStart) -> None:
        """Begin a run, or go on with the one that `output_dir` notes."""
        import wandb

        known = _noted(run.folder / self.NOTE)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", run.folder.name),
            dir=str(run.folder),
            config=dict(run.settings),
            id=known,
            resume="allow",
        )
        if known is None:
            _note(run.folder / self.NOTE, self._run.id)

    def on_step(self, record: dict[str, Any]) -> None:
        """Hand over the numbers."""
        self._run.log(dict(_numbers(record)), step=record["step"])

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """As of a step."""
        self.on_step(record)

    def on_end(self, result: dict[str, Any] | None) -> None:
        """End the run there, as failed where it is not whole."""
        if self._run is not None:
            self._run.finish(exit_code=int(result is None))


class MLflow(Callback):
    """A run of MLflow; in its experiment `raco-fast` where the environment names no other."""

    NOTE = "mlflow_run.txt"
    _id: str | None = None

    def on_start(self, run: RunStart) -> None:
        """Begin a run, or go on with the one that `output_dir` notes."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client: Any = MlflowClient()
        known = _noted(run.folder / self.NOTE)
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment, run_name=run.folder.name).info.run_id
        values = [(_plain(name), str(value)) for name, value in run.settings.items()]
        given = [Param(name, value[:_LONGEST]) for name, value in values]
        for k in range(0, len(given), _AT_ONCE):
            self._client.log_batch(self._id, params=given[k : k + _AT_ONCE])
        _note(run.folder / self.NOTE, self._id)

    def on_step(self, record: dict[str, Any]) -> None:
        """Hand over the numbers, in one request."""
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), record["step"]
        values = [Metric(_plain(name), value, now, step) for name, value in _numbers(record)]
        self._client.log_batch(self._id, metrics=values)

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """As of a step."""
        self.on_step(record)

    def on_end(self, result: dict[str, Any] | None) -> None:
        """End the run there, as killed where it is not whole."""
        if self._id is not None:
            status = "KILLED" if result is None else "FINISHED"
            self._client.set_terminated(self._id, status=status)


LOGGERS: Mapping[str, type[Callback]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
"""Name in the config, which is that of the package and of our extra -> callback."""

LEFT_BEHIND = ("tensorboard", "wandb", WandB.NOTE, MLflow.NOTE)
"""Names in `output_dir` of what loggers leave there."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is unknown or there twice, or a package that is missing."""
    for k, name in enumerate(names):
        if name not in LOGGERS or name in names[:k]:
            raise ValueError(
                f"`loggers` must name each of {sorted(LOGGERS)} at most once, got {list(names)}; "
                f"correct it"
            )
        if find_spec(name) is None:
            raise ValueError(
                f"`loggers`: {name!r} needs the package {name}; pip install 'raco-fast[{name}]'"
            )


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name != "step" and isinstance(value, (int, float)):
            yield name, value


def _plain(name: str) -> str:
    """A name that MLflow takes; other letters by their number, so that two names stay two."""
    return re.sub(r"[^\w./ :-]", lambda found: f"_{ord(found[0]):x}_", name, flags=re.ASCII)


def _noted(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _note(file: Path, name: str) -> None:
    with atomic_file(file) as partial:
        partial.write_text(f"{name}\n", encoding="utf-8")
