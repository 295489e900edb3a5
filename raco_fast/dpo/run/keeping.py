"""When a run saves a checkpoint, and which of them stay."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_fast.dpo.run.checkpoint import TrainingState, checkpoints_in, read_state
from raco_fast.dpo.run.files import clear_leftovers, remove_folder
from raco_fast.dpo.run.together import by_first

if TYPE_CHECKING:
    from raco_fast.dpo.run.config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The checkpoint with the smallest held-out loss of an objective.

    It is found from what checkpoints say of themselves, so a run that goes on finds it again, and
    also after `keep_best` has changed. Losses on other held-out pairs are not compared.

    Args:
        objective: whose `eval_loss/<objective>` counts. Accuracies of a few hundred pairs are
            often equal, and the loss is what is trained.
        data: `data_hash` of the held-out pairs.
    """

    objective: str
    data: str

    def among(self, folder: Path) -> tuple[float, Path] | None:
        """Its loss and the checkpoint, the older one of equals; None without any evaluated."""
        paths = checkpoints_in(folder)
        losses = [self.loss(read_state(path).get("evaluation")) for path in paths]
        found = zip(losses, paths, strict=True)
        return min(((loss, path) for loss, path in found if loss is not None), default=None)

    def loss(self, evaluation: Mapping[str, Any] | None) -> float | None:
        """Of what `evaluated` has noted; None if it cannot be compared."""
        if evaluation is None or evaluation["data"] != self.data:
            return None
        loss: float | None = evaluation["losses"].get(self.objective)
        return loss

    def beaten(self, folder: Path, evaluation: Mapping[str, Any] | None) -> bool:
        """Whether an evaluation is better than those of all checkpoints under `folder`."""
        loss = self.loss(evaluation)
        if loss is None:
            return False
        best = self.among(folder)
        return best is None or loss < best[0]


def evaluated(record: Mapping[str, Any], data: str) -> dict[str, Any]:
    """What a checkpoint notes of an evaluation of its parameters on the pairs of hash `data`."""
    prefix = "eval_loss/"
    named = {n.removeprefix(prefix): v for n, v in record.items() if n.startswith(prefix)}
    known = {n: v for n, v in named.items() if v is not None and math.isfinite(v)}
    return {"data": data, "losses": known}


class Checkpoints:
    """The checkpoints of a run.

    Args:
        best: kept beside the newest ones; None keeps none for its evaluation.
    """

    def __init__(self, config: TrainConfig, state: TrainingState, best: Best | None) -> None:
        self.folder = config.folder / "checkpoints"
        self._config, self._state, self._best = config, state, best
        self._saved_at = time.monotonic()
        self._on_disk: tuple[int, Any] | None = None  # step and evaluation

    @property
    def newest(self) -> Path:
        """The last one written or read."""
        assert self._on_disk is not None
        return self.folder / f"step-{self._on_disk[0]:08d}"

    def is_on_disk(self) -> None:
        """What the state holds is in the newest checkpoint."""
        self._on_disk = (self._state.step, self._state.evaluation)

    def wanted(self) -> bool:
        """Whether to save now, for what only the first process knows: its clock, evaluations."""
        minutes, evaluation = self._config.save_minutes, self._state.evaluation
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return late or (self._best is not None and self._best.beaten(self.folder, evaluation))

    def save(self) -> bool:
        """Write a checkpoint, unless this very state is on disk, and remove those not kept.

        All processes save together.

        Returns:
            Whether one was written.
        Raises:
            OSError: as `TrainingState.save`; a checkpoint could not be removed.
        """
        state = self._state
        new = self._on_disk != (state.step, state.evaluation)
        if new:
            state.save(self.folder)
            self.is_on_disk()
        by_first(state.processes, self._remove_others)
        self._saved_at = time.monotonic()
        return new

    def _remove_others(self) -> None:
        clear_leftovers(self.folder)
        kept = checkpoints_in(self.folder)[-self._config.keep :]
        best = None if self._best is None else self._best.among(self.folder)
        for path in checkpoints_in(self.folder):
            if path not in kept and (best is None or path != best[1]):
                remove_folder(path)

    def tell_best(self) -> None:
        """Log which checkpoint is the best one, if the run keeps it."""
        best = None if self._best is None else self._best.among(self.folder)
        if self._best is not None and best is not None:
            what = f"eval_loss/{self._best.objective}"
            logger.info("the smallest %s, %.4g, is that of %s", what, *best)
