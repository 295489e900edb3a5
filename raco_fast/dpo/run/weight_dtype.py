"""`model.dtype: auto`, settled when a run begins and kept with it.

Measured anew, a run that is resumed on a busy machine, or on another one, would go on in another
dtype: with other weights, other rounding and other reference log-probabilities.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.faster_dtype import DtypeName, faster_dtype
from raco_fast.dpo.models import DTYPES, pick_device
from raco_fast.dpo.policy import load_config
from raco_fast.dpo.run.checkpoint import read_state
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.together import by_first
from raco_fast.dpo.saved_adapters import find_adapter

logger = logging.getLogger(__name__)

_NAME = "dtype.txt"


def with_dtype(
    config: TrainConfig, processes: Processes, checkpoint: Path | None = None, *, keep: bool = True
) -> TrainConfig:
    """The config with fp32 or bf16 in place of `model.dtype: auto`; any other as it is.

    It is the dtype of the checkpoint that a run goes on from; that with which a run in the folder
    has begun; or the faster one here, as the first process measures it.

    Args:
        checkpoint: to go on from.
        keep: write a new choice to the run's folder, for a run that is started again.
    Raises:
        ValueError: no such model; a file in the run's folder that holds no dtype.
        OSError: the choice could not be written.
    """
    if config.model.dtype != "auto":
        return config
    name = processes.say(by_first(processes, lambda: _settled(config, checkpoint, keep)))
    dtype: DtypeName = "bf16" if name == "bf16" else "fp32"
    return replace(config, model=replace(config.model, dtype=dtype))


def _settled(config: TrainConfig, checkpoint: Path | None, keep: bool) -> str:
    file = config.folder / _NAME
    if checkpoint is not None:
        name, why = read_state(checkpoint)["run"]["settings"]["model"]["dtype"], f"as {checkpoint}"
    elif file.is_file():
        name, why = _read(file), f"as the run in {config.folder} began ({file.name})"
    else:
        options = config.model
        continued = options.adapter == "continue" and find_adapter(options) is not None
        full = options.lora is None and not continued
        name, why = faster_dtype(load_config(options), pick_device(options.device), full=full)
        if keep:
            with atomic_file(file) as partial:
                partial.write_text(f"{name}\n", encoding="utf-8")
    logger.info("`model.dtype: auto` is %s: %s", name, why)
    return str(name)


def _read(file: Path) -> str:
    name = file.read_text(encoding="utf-8", errors="replace").strip()
    if name not in DTYPES:
        raise ValueError(
            f"{file} must hold {' or '.join(DTYPES)}, the dtype that its run began with, got "
            f"{name[:40]!r}; write it there, or set `model.dtype`"
        )
    return name
