"""A tiny model with its data, as for runs of `train`, and sweeps of it in this process."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tiny_runs import preference_files, runs, save_tiny, settings, tiny  # noqa: F401

from raco_fast.dpo.run.interrupt import Interrupt
from raco_fast.studies import sweep as sweep_module
from raco_fast.studies import worker
from raco_fast.studies.plan import Run
from raco_fast.studies.sweep_config import SweepConfig
from raco_fast.studies.worker import Ended

RULES = ["linear", "cagrad-clip"]
WEIGHTS = [{"sure": 0.7, "kind": 0.3}, {"sure": 0.2, "kind": 0.8}]


@pytest.fixture
def base(settings) -> dict[str, Any]:  # noqa: F811
    """Settings of a run of two steps."""
    (data,), (eval_data,) = settings["data"], settings["eval_data"]
    few = {"data": [data | {"limit": 16}], "eval_data": [eval_data | {"limit": 8}]}
    return settings | few | {"epochs": 1}


@pytest.fixture
def make_sweep(base, tmp_path) -> Callable[..., SweepConfig]:
    """A function that makes the settings of a sweep of four runs, changed by its arguments."""

    def make(changes: dict[str, Any] | None = None, **others: Any) -> SweepConfig:
        given = {
            "base": base | (changes or {}),
            "grid": {"rule": RULES, "weights": WEIGHTS},
            "output_dir": str(tmp_path / "sweep"),
            "threads": 1,
        }
        return SweepConfig(**(given | others))

    return make


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Sweeps make their runs in this process, one after another, and print to the terminal."""

    def ended(
        todo: Sequence[Run], config: SweepConfig, interrupt: Interrupt
    ) -> Iterator[tuple[Run, Ended]]:
        for run in todo:
            yield run, worker._made(run, None, config.threads_of_each, config.keep)

    monkeypatch.setattr(sweep_module, "ended", ended)
    monkeypatch.setattr(worker, "_print_into", lambda file: None)
