"""A sweep: every run of a grid, those that are finished left as they are, and a table of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.interrupt import Interrupt
from raco_fast.report import text_table
from raco_fast.studies.finished import read_finished
from raco_fast.studies.plan import Run, planned
from raco_fast.studies.pool import ended
from raco_fast.studies.sweep_config import SweepConfig
from raco_fast.studies.worker import Ended

_ACCURACY = "eval_rewards/accuracies/"
_NOT_STARTED = Ended("stopped", "not started")


@dataclass
class SweepResult:
    """How the runs of a sweep ended.

    Args:
        runs: in the order of the grid.
        ends: name of a run -> how it ended; a run that was finished before is "finished".
        stopped: whether a signal has stopped the sweep.
    """

    runs: Sequence[Run]
    ends: dict[str, Ended] = field(default_factory=dict)
    stopped: bool = False

    def end_of(self, run: Run) -> Ended:
        """How a run ended, also one that never began."""
        return self.ends.get(run.name, _NOT_STARTED)

    @property
    def is_whole(self) -> bool:
        """Whether every run is finished."""
        return all(self.end_of(run).status == "finished" for run in self.runs)

    @property
    def failed(self) -> list[Run]:
        """The runs that ended with an error."""
        return [run for run in self.runs if self.end_of(run).status == "failed"]


def sweep(config: SweepConfig) -> SweepResult:
    """Make every run of a sweep that is not finished, and write a table of all, `runs.json`.

    Call it from a module or under `if __name__ == "__main__":`, as the processes of the runs import
    the calling script. A run that was interrupted goes on from its checkpoint.

    Raises:
        ValueError, OSError: as `planned`; the table could not be written.
        KeyboardInterrupt: a second signal while runs save their checkpoints.
    """
    runs = planned(config)
    todo = [run for run in runs if not run.finished]
    print(
        f"sweep: {len(runs)} runs in {config.folder}, {len(runs) - len(todo)} of them finished "
        f"before; {config.jobs} at a time with {config.threads_of_each} thread(s) each"
    )
    result = SweepResult(runs, {run.name: Ended("finished") for run in runs if run.finished})
    with Interrupt() as interrupt:
        for count, (run, end) in enumerate(ended(todo, config, interrupt), start=1):
            result.ends[run.name] = end
            why = f": {' '.join(end.reason.split())}" if end.reason else ""
            print(f"sweep: {count} of {len(todo)}: {run.name} {end.status}{why}", flush=True)
        result.stopped = interrupt.requested
    _write(result, config.folder)
    return result


def table(result: SweepResult) -> str:
    """The runs with their settings, how they ended, and their last held-out accuracies."""
    swept = list(result.runs[0].point)
    objectives = list(dict.fromkeys(name for run in result.runs for name in run.config.weights))
    rows = []
    for run in result.runs:
        evaluation = _evaluation(run, result)
        accuracies = [evaluation.get(f"{_ACCURACY}{name}") for name in objectives]
        cells = ["-" if value is None else f"{value:.3f}" for value in accuracies]
        values = [_shown(run.point[name]) for name in swept]
        rows.append((*values, result.end_of(run).status, *cells))
    return text_table((*swept, "run", *objectives), rows)


def _write(result: SweepResult, folder: Path) -> None:
    rows = []
    for run in result.runs:
        end, evaluation = result.end_of(run), _evaluation(run, result)
        of_end = {"status": end.status, "reason": end.reason, "evaluation": evaluation}
        rows.append({"run": run.name, "point": run.point, **of_end})
    with atomic_file(folder / "runs.json") as partial:
        partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _evaluation(run: Run, result: SweepResult) -> Mapping[str, Any]:
    if result.end_of(run).status != "finished":
        return {}
    found = read_finished(run.config.folder)
    assert found is not None
    return found.evaluation


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        parts = ((name, _shown(inner)) for name, inner in value.items())
        return "/".join(text if name == "name" else f"{name} {text}" for name, text in parts)
    return f"{value:g}" if isinstance(value, float) else str(value)
