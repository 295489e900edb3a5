"""From which checkpoint a run goes on, and whether it may."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.run.checkpoint import TrainingState, check_whole, latest, read_state
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.identity import check_same_content, check_same_run
from raco_fast.dpo.run.length import check_total, follow_schedule
from raco_fast.dpo.run.together import by_first, together

logger = logging.getLogger(__name__)


def checkpoint_to_resume(
    config: TrainConfig, resume: bool, overwrite: bool, processes: Processes
) -> Path | None:
    """The checkpoint to go on from, whole and of the same settings; None for a new run.

    Raises:
        ValueError: there is none, or the folder belongs to another run and `overwrite` is not
            asked for, or cannot be done; it is damaged, or was made with settings that another run
            has.
    """
    if resume and overwrite:
        raise ValueError("`resume` goes on with a run and `overwrite` removes it; choose one")
    if overwrite:
        together(processes, lambda: _check_removable(config))
        return None
    found = together(processes, lambda: _found(config, resume))
    if found is not None:
        by_first(processes, partial(check_whole, found))
        saved = together(processes, lambda: read_state(found)["run"]["settings"])
        together(processes, lambda: check_same_run(config, saved, found))
    return found


def _found(config: TrainConfig, resume: bool) -> Path | None:
    """The newest checkpoint; refuses to mix two runs in one folder."""
    output_dir = config.folder
    found = latest(output_dir / "checkpoints")
    if resume and found is None:
        raise ValueError(
            f"`resume`: there is no checkpoint under {output_dir / 'checkpoints'}; "
            "leave `--resume` out to start"
        )
    if not resume and found is not None:
        raise ValueError(
            f"`output_dir` already holds {found}; add --resume to go on from it or --overwrite "
            "to remove it, or choose another `output_dir`"
        )
    if not resume and (output_dir / "model").exists():
        raise ValueError(
            f"`output_dir` already holds a trained model, {output_dir / 'model'}; "
            "choose another `output_dir`, or add --overwrite to remove it"
        )
    return found


def _check_removable(config: TrainConfig) -> None:
    """Refuse to remove what the run begins with."""
    begins = [("model.name", config.model.name), ("model.tokenizer", config.model.tokenizer or "")]
    for name, value in begins:
        path = Path(value).expanduser()
        if value and path.exists() and path.resolve().is_relative_to(config.folder.resolve()):
            raise ValueError(
                f"`{name}` is in the `output_dir` that --overwrite would remove, got {value!r} in "
                f"{config.folder}; choose another `output_dir`"
            )


def remove_run(folder: Path) -> None:
    """Remove what a run has left in its folder, and nothing else that is there.

    Raises:
        OSError: a file could not be removed.
    """
    for name in ("checkpoints", "model", "tensorboard"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    (folder / "metrics.jsonl").unlink(missing_ok=True)


def go_on_from(checkpoint: Path, state: TrainingState, config: TrainConfig, total: int) -> bool:
    """Put a checkpoint's contents into the state of a run of `total` steps.

    Returns:
        Whether the run has other held-out pairs than the one that wrote it.
    Raises:
        ValueError: its data or model had another content, or it has done more steps.
    """
    read, own = together(state.processes, lambda: read_state(checkpoint)), state.run
    saved = read["run"]
    for what in ("data", "model", "margin_rewards"):
        check_same_content(config, what, saved, own, checkpoint)
    check_total(read["step"], saved["total_steps"], total, checkpoint)
    state.load(checkpoint)
    follow_schedule(state.scheduler)
    own["settings"]["rounding"] = state.optimizer.rounding
    own["held_out_at_first"] = saved["held_out_at_first"]
    others = bool(saved["held_out"] != own["held_out"])
    if others:
        logger.info(
            "the held-out pairs are others than those of the checkpoint: the model is evaluated "
            "on them now, and earlier evaluations in metrics.jsonl are of other pairs"
        )
    return others
