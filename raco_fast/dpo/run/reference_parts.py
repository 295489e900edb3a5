"""Reference log-probabilities on their way into the cache, so that an interruption loses a minute.

Every process of a run writes what it has scored to a file of its own, once a minute and when it is
stopped. A run that scores the same pairs again begins with what all those files hold; a damaged one
counts as not written. What is scored in one batch is taken over only as a whole: with the batches
of the interrupted run, the values are to the last bit those of one that was not.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from pathlib import Path

import torch
from torch import Tensor

from raco_fast.dpo.run.checksums import DamagedError, load_checked, save_checked
from raco_fast.dpo.run.files import atomic_file

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0


class ReferenceParts:
    """The parts of the log-probabilities of all pairs, in a folder.

    Args:
        folder: belongs to these pairs, this model and these micro-batches alone.
        shape: (number of pairs, values of each).
    """

    def __init__(self, folder: Path, shape: tuple[int, int]) -> None:
        self.folder, (self._n, self._columns) = folder, shape
        self._file = folder / f"part-{uuid.uuid4().hex}.safetensors"
        self._indices: list[int] = []
        self._values: list[Tensor] = []
        self._written, self._wrote_at = 0, time.monotonic()
        self._broken = False

    def load(self) -> Tensor:
        """What earlier runs have left: float32 of `shape`, -inf where there is nothing."""
        values, parts = torch.full((self._n, self._columns), -torch.inf), 0
        for file in sorted(self.folder.glob("part-*.safetensors")):
            try:
                found = load_checked(file)
                indices, logps = found["indices"], found["logps"]
                fits = indices.dim() == 1 and logps.shape == (indices.numel(), self._columns)
                kinds = (indices.dtype, logps.dtype) == (torch.int64, torch.float32)
                if not (fits and kinds and bool(((indices >= 0) & (indices < self._n)).all())):
                    raise DamagedError(f"{file} is of other pairs")
            except (DamagedError, KeyError, OSError) as error:
                logger.warning("a part of the reference pass is scored again: %s", error)
                continue
            values[indices] = logps
            parts += 1
        if parts:
            known = int((values > -torch.inf).all(dim=1).sum())
            logger.info("reference: %d of %d pairs are known from before", known, self._n)
        return values

    def add(self, indices: list[int], values: Tensor) -> None:
        """Take the values [k, columns] of k pairs; now and then, write all there are."""
        self._indices += indices
        self._values.append(values)
        if time.monotonic() - self._wrote_at >= EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what this process has; a folder that cannot be written is told once."""
        self._wrote_at = time.monotonic()
        if self._broken or len(self._indices) == self._written:
            return
        content = {"indices": torch.tensor(self._indices), "logps": torch.cat(self._values)}
        try:
            with atomic_file(self._file) as partial:
                save_checked(partial, content)
            self._written = len(self._indices)
        except OSError as error:
            self._broken = True
            logger.warning(
                "an interruption of the reference pass will lose what it has scored: %s", error
            )

    def remove(self) -> None:
        """Remove all parts: they are in the cache."""
        shutil.rmtree(self.folder, ignore_errors=True)
