"""What all processes of a step must have alike: replicas' gradients, and the settings."""

import zlib
from typing import NoReturn

import torch
from torch import Tensor

from raco_fast.distributed.processes import Processes

# Replicas on unlike processors may differ by the rounding of their own Gram matrices.
_ALIKE = 1e-6


def refuse_unlike(largest: Tensor, smallest: Tensor) -> None:
    """Raise RuntimeError where Gram matrices of what should be the same gradients differ."""
    norms = largest.diagonal().sqrt()
    apart = (largest - smallest) / torch.outer(norms, norms)
    if bool((apart > _ALIKE).any()):
        raise RuntimeError(
            f"the gradients of replicas must be the same on all processes, and their inner "
            f"products differ by {float(apart.nan_to_num(0.0).max()):.1e} of their size: nobody "
            f"has averaged them. DistributedDataParallel averages one backward pass for each "
            f"forward pass, so of objectives that share one only the first. Use backward(losses), "
            f"which averages all objectives, with or without such a wrapper; or run the wrapped "
            f"model once for each `with objective(name):`. Shards of tensor parallelism are "
            f"averaged over the data by fully_shard on the other dimension of their mesh. "
            f"Independent runs: process_group=None, or the group of each"
        )


def check_settings(settings: object, processes: Processes) -> None:
    """Raise RuntimeError, on all processes, unless they have the same settings."""
    if not processes.alike(torch.tensor([code_of(settings)], dtype=torch.float64)):
        refuse_settings(settings)


def refuse_settings(settings: object) -> NoReturn:
    """Raise RuntimeError for settings that differ between processes."""
    raise RuntimeError(
        f"the settings of the optimizer must be the same on all processes, and are not; here they "
        f"are {settings}; set them alike, or give independent runs process_group=None"
    )


def code_of(settings: object) -> int:
    """A number of 20 bits, so that sums of squares over processes are exact in float64."""
    return zlib.crc32(repr(settings).encode()) >> 12
