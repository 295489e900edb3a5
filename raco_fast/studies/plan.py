"""The runs of a sweep before any starts: their folders and configs, all of them checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from raco_fast.dpo.models import pick_device
from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.files import atomic_file
from raco_fast.settings.parsing import from_settings
from raco_fast.settings.paths import expanded
from raco_fast.settings.text import read
from raco_fast.studies.finished import NAME, read_finished
from raco_fast.studies.grid import Point, applied, name_of, points_of
from raco_fast.studies.sweep_config import SweepConfig

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Args:
        name: of its folder, which tells its point of the grid.
        point: setting -> value.
        settings: all that is given, as `config.yaml` in its folder has them.
        config: what they come to.
        finished: whether it has been made before.
    """

    name: str
    point: Point
    settings: Mapping[str, Any]
    config: TrainConfig
    finished: bool

    def write_config(self) -> None:
        """Write the config with which `raco-fast train` repeats the run.

        Not over that of a run that has begun: if it is another one, the trainer will say so.

        Raises:
            OSError: it could not be written.
        """
        if latest(self.config.folder / "checkpoints") is not None:
            return
        with atomic_file(self.config.folder / CONFIG) as partial:
            text = yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True)
            partial.write_text(text, encoding="utf-8")


def planned(sweep: SweepConfig) -> list[Run]:
    """Every run of a sweep, in the order of its grid.

    Raises:
        ValueError: settings of a run that `raco-fast train` would refuse (the run is named); a
            folder that holds another finished run (what differs is named).
        OSError: a file that cannot be read.
    """
    for device in sweep.devices:
        pick_device(device)  # raises where this machine has no such one
    base = (
        sweep.base if isinstance(sweep.base, dict) else read(expanded(sweep.base, "base"), "base")
    )
    runs = [_run(sweep, base, point) for point in points_of(base, sweep.grid)]
    _check_names_differ(runs)
    return runs


def _run(sweep: SweepConfig, base: Mapping[str, Any], point: Point) -> Run:
    name = name_of(point)
    folder = sweep.folder / name
    settings = {**applied(base, point), "output_dir": str(folder)}
    try:
        config = from_settings(TrainConfig, settings)
    except ValueError as error:
        raise ValueError(f"the run {name}: {error}") from error
    if config.model.dtype == "auto":
        raise ValueError(
            f"the run {name}: `model.dtype` must be fp32 or bf16 in a sweep, got 'auto', which "
            f"every run would measure for itself, so that runs could differ in it; write one"
        )
    # Without that file the trainer goes on from the last checkpoint, and compares contents itself.
    finished = read_finished(folder) if (folder / NAME).is_file() else None
    if finished is not None and (others := finished.differences(config)):
        raise ValueError(
            f"`output_dir` {folder} holds another finished run ({'; '.join(others)}); choose "
            f"another `output_dir` for this sweep, or remove that folder"
        )
    return Run(name, point, settings, config, finished is not None)


def _check_names_differ(runs: Sequence[Run]) -> None:
    by_name: dict[str, Run] = {}
    for run in runs:
        other = by_name.setdefault(run.name, run)
        if other is not run:
            raise ValueError(
                f"two points of `grid` have the same name {run.name!r}: {other.point} and "
                f"{run.point}; sweep one of them in an `output_dir` of its own"
            )
