"""Whether the folders of a run can be written and have room, before anything costs time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from raco_fast.dpo.run.files import atomic_file

logger = logging.getLogger(__name__)


def check_writable(folder: Path, name: str) -> None:
    """Create a folder where it is missing, and write and remove a small file in it.

    Args:
        name: of the setting that names it.
    Raises:
        OSError: that is not possible.
    """
    probe = folder / ".write-test"
    try:
        with atomic_file(probe) as partial:
            partial.write_bytes(b"\0" * 4096)  # a full disk takes the file's name, but not this
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"`{name}` must be a folder that can be written, got {folder} "
            f"({error.__cause__ or error}); check its rights and the space left, or choose another"
        ) from error


def needed_bytes(
    parameters: Iterable[nn.Parameter], rounding: str, moves: bool = False
) -> tuple[int, int]:
    """Bytes of (the trained weights, a checkpoint of them with the optimizer's state).

    Args:
        moves: whether the reference does, whose weights, at least float32, are then in it too.
    """
    weights = residuals = reference = 0
    for p in parameters:
        weights += p.numel() * p.element_size()
        split = rounding == "split" and p.dtype == torch.bfloat16
        residuals += p.numel() * p.element_size() if split else 0
        reference += p.numel() * max(4, p.element_size()) if moves else 0
    return weights, 3 * weights + residuals + reference


def check_room(
    folder: Path,
    parameters: Iterable[nn.Parameter],
    rounding: str,
    kept: int,
    moves: bool = False,
) -> None:
    """Refuse a disk that has no room for one checkpoint, warn of one that has none for the run.

    A run has one checkpoint more than it keeps while it writes one, and the trained model in the
    end. What an earlier run has left in `folder` counts for these.

    Args:
        kept: checkpoints that stay.
        moves: as in `needed_bytes`.
    Raises:
        OSError: there is no room for the next checkpoint (with both numbers).
    """
    weights, checkpoint = needed_bytes(parameters, rounding, moves)
    usage = shutil.disk_usage(folder)
    if not usage.total:
        return  # a file system that does not tell
    numbers = (
        f"{_gigabytes(usage.free)} are free at {folder} and a checkpoint takes about "
        f"{_gigabytes(checkpoint)}"
    )
    if usage.free < checkpoint:
        raise OSError(
            f"`output_dir` must have room for a checkpoint, but {numbers}; free some space or "
            f"choose another `output_dir`"
        )
    ours = sum(file.stat().st_size for file in folder.glob("*/**/*") if file.is_file())
    if usage.free + ours < (needed := (kept + 1) * checkpoint + weights):
        logger.warning(
            "%s; %d of them and the trained model need %s: free some space before the end",
            numbers,
            kept + 1,
            _gigabytes(needed),
        )


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.3g} GB"
