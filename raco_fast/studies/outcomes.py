"""What finished runs came to on their held-out pairs, read from their folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raco_fast.dpo.run.identity import compared
from raco_fast.settings.paths import expanded
from raco_fast.solver.registry import check_rule, label_of
from raco_fast.studies.finished import NAME, Finished, read_finished
from raco_fast.studies.pareto_config import METRICS

_OF_A_RUN = (NAME, "metrics.jsonl", "config.yaml")


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Args:
        folder: of the run.
        rule: its label.
        seed: its seed.
        weights: objective -> weight; None for a rule that ignores them.
        has_ray: whether the weights stay the same over the run, and so name a direction.
        settings: all settings.
        compared: dotted name -> value of those settings that change what is learnt.
        values: objective -> the metric, as it is in metrics.jsonl.
    """

    folder: Path
    rule: str
    seed: int
    weights: dict[str, float] | None
    has_ray: bool
    settings: dict[str, Any]
    compared: dict[str, Any]
    values: dict[str, float]


def read_outcomes(paths: Sequence[str], metric: str) -> tuple[list[Outcome], list[Path]]:
    """The outcomes of all finished runs in folders, and the folders of runs that are not finished.

    Args:
        paths: of runs, or of folders that hold runs, such as those of a sweep.
        metric: a name in `METRICS`.
    Raises:
        ValueError: a folder without a run; none is finished; a run without held-out pairs, or with
            a value that is not finite; runs of different objectives or held-out pairs.
        OSError: a folder that is not there.
    """
    folders = dict.fromkeys(folder.resolve() for path in paths for folder in _runs_in(path))
    read = {folder: read_finished(folder) for folder in folders}
    finished = {folder: each for folder, each in read.items() if each is not None}
    if not finished:
        raise ValueError(
            f"`runs` must name finished runs, got {len(folders)} that are not, the first "
            f"{next(iter(folders))}; wait for their end, or go on with --resume"
        )
    _check_alike(finished)
    outcomes = [_outcome(folder, each, metric) for folder, each in finished.items()]
    return outcomes, [folder for folder, each in read.items() if each is None]


def _runs_in(path: str) -> list[Path]:
    folder = expanded(path, "runs")
    if not folder.is_dir():
        raise FileNotFoundError(f"`runs` must be folders, got {folder}, which is none; check it")
    if _is_run(folder):
        return [folder]
    inside = sorted(each for each in folder.iterdir() if each.is_dir() and _is_run(each))
    if not inside:
        raise ValueError(
            f"`runs` must be folders of runs or sweeps, got {folder}, where there is no run; give "
            f"the `output_dir` of `raco-fast train` or of `raco-fast sweep`"
        )
    return inside


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _OF_A_RUN)


def _check_alike(finished: dict[Path, Finished]) -> None:
    """Raise ValueError unless all runs have the same objectives and the same held-out pairs."""
    first, one = next(iter(finished.items()))
    objectives = sorted(one.settings["weights"])
    for folder, other in finished.items():
        theirs = sorted(other.settings["weights"])
        if theirs != objectives:
            raise ValueError(
                f"`runs` must have the same objectives, got {objectives} in {first} and {theirs} "
                f"in {folder}; compare them apart"
            )
        if other.evaluation and one.evaluation and other.run["held_out"] != one.run["held_out"]:
            raise ValueError(
                f"`runs` must be evaluated on the same held-out pairs, got others in {folder} than "
                f"in {first}: their values cannot be compared; evaluate them on the same "
                f"`eval_data`, with --resume"
            )


def _outcome(folder: Path, run: Finished, metric: str) -> Outcome:
    settings, prefix = run.settings, METRICS[metric].prefix
    names = list(settings["weights"])
    if not run.evaluation:
        raise ValueError(
            f"the run {folder} has no evaluation after its last step: it had no held-out pairs; "
            f"give it `eval_data` and go on with --resume, or leave it out"
        )
    values: dict[str, Any] = {name: run.evaluation.get(f"{prefix}{name}") for name in names}
    wrong = [name for name, v in values.items() if v is None or not math.isfinite(v)]
    if wrong:
        raise ValueError(
            f"the run {folder} has no finite `{prefix}<objective>` for {wrong}: no held-out pair "
            f"is labelled for it, or the run diverged; leave the run out, or label some"
        )
    rule = check_rule(settings["rule"])
    return Outcome(
        folder,
        label_of(rule),
        settings["seed"],
        dict(settings["weights"]) if rule.uses_weights else None,
        rule.uses_weights and settings.get("weights_schedule") is None,
        settings,
        compared(settings),
        {name: float(value) for name, value in values.items()},
    )
