"""The part of a checkpoint that every process of a sharded model writes for itself.

A folder of torch.distributed.checkpoint, which knows where each part of a tensor lies, so that any
number of processes can read it. Its keys are those of torch's flattened state_dicts:

    <parameter>                 trained parameters
    state.<parameter>.<key>     the optimizer's state of the parameter's shape
    reference:<parameter>       the same weight of a reference that moves

torch.distributed.checkpoint is imported only where there is such a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_STATE = "state."
_REFERENCE = "reference:"


def found(checkpoint: Path) -> bool:
    """Whether a checkpoint has such a folder."""
    return (checkpoint / "shards").is_dir()


def has_reference(checkpoint: Path) -> bool:
    """Whether such a folder holds the weights of a reference."""
    return any(key.startswith(_REFERENCE) for key in _metadata(checkpoint / "shards"))


def taken_from(
    optimizer: dict[str, Any], parameters: dict[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors to save; those of the optimizer's state_dict are taken out of it.

    Args:
        parameters: in the order in which the optimizer has them.
        reference: parameter -> the reference's.
    """
    tensors, kept = dict(parameters), {}
    tensors |= {_REFERENCE + name: weight for name, weight in reference.items()}
    for k, name in enumerate(parameters):
        state = optimizer["state"].get(k, {})
        cut = {key for key, value in state.items() if hasattr(value, "device_mesh")}
        tensors |= {f"{_STATE}{name}.{key}": state[key] for key in cut}
        if state:
            kept[k] = {key: value for key, value in state.items() if key not in cut}
    optimizer["state"] = kept
    return tensors


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's part of each tensor; all processes have to.

    Raises:
        OSError: one of them could not.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(tensors, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        raise OSError(f"process {rank} could not write its part: {reason}") from error


def parameter_names(folder: Path) -> set[str]:
    """The names of the parameters in a folder."""
    return {key for key in _metadata(folder) if not key.startswith((_STATE, _REFERENCE))}


def load_shards(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: dict[str, Any],
    reference: Mapping[str, Tensor],
) -> None:
    """Fill parameters in place, whole or cut in any way, and put the state into a state_dict.

    Args:
        reference: parameter -> a weight of a reference, to be filled too; may be empty.

    Raises:
        OSError: a process could not read its part.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors: dict[str, Tensor] = {name: p.detach() for name, p in parameters.items()}
    tensors |= {_REFERENCE + name: weight for name, weight in reference.items()}
    for key, entry in _metadata(folder).items():
        if key.startswith(_STATE):
            name, of_state = key.removeprefix(_STATE).rsplit(".", 1)
            number, parameter = list(parameters).index(name), parameters[name].detach()
            tensors[key] = torch.empty_like(parameter, dtype=entry.properties.dtype)
            optimizer["state"][number][of_state] = tensors[key]
    try:
        load(tensors, storage_reader=FileSystemReader(folder))
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        raise OSError(f"process {rank} could not read its part of {folder}: {reason}") from error


def _metadata(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return FileSystemReader(folder).read_metadata().state_dict_metadata
