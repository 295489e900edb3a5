"""What a run says when memory runs out or a file cannot be written, and what is left of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOMEM
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raco_fast.distributed.processes import OtherProcessError
from raco_fast.dpo.run.checkpoint import latest

if TYPE_CHECKING:
    from raco_fast.dpo.run.config import TrainConfig

# Of errors that have no class of their own: torch's allocator for the CPU, the system, C++, cuBLAS,
# CUDA outside of torch's allocator, Python's threads.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
    "out of memory",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the CPU or a GPU has run out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(t in text for t in _OUT_OF_MEMORY)


@contextmanager
def memory_named(what: str, cure: str) -> Iterator[None]:
    """Say where memory has run out and what takes less.

    Raises:
        MemoryError: in place of any error that says so, with `what` was done and the `cure`.
    """
    try:
        yield
    except OtherProcessError:  # theirs, which they name themselves
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, _NamedMemoryError) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines() or ["the system gave no more"]
        raise _NamedMemoryError(f"memory ran out in {what} ({reason[0]}); {cure}") from error


class _NamedMemoryError(MemoryError):
    """One that says all already."""


def to_hold_a_model(config: "TrainConfig") -> str:
    """What takes less memory where a model is loaded."""
    ways = ["set `model.dtype: bf16`"] if config.model.dtype != "bf16" else []
    ways += [] if config.model.lora else ["train an adapter (`model.lora`)"]
    ways += ["spread it over several GPUs (`parallel.kind: fsdp2`)", "use a larger machine"]
    return ", or ".join(ways)


def to_run_a_model(config: "TrainConfig") -> str:
    """What takes less memory where pairs go through a model."""
    ways = []
    if config.pairs_per_micro_batch > 1:
        ways.append(f"lower `pairs_per_micro_batch` ({config.pairs_per_micro_batch} now)")
    if not config.model.gradient_checkpointing:
        ways.append("set `model.gradient_checkpointing: true`")
    ways.append(f"lower `chunk_tokens` ({config.chunk_tokens} now) or `tokens.max_length`")
    return ", or ".join([*ways, to_hold_a_model(config)])


@contextmanager
def what_is_left(folder: Path, kind: type[OSError] | type[MemoryError]) -> Iterator[None]:
    """Say from where a run that fails can go on.

    Raises:
        OSError, MemoryError: of the `kind`, with the newest checkpoint under `folder` added to
            its message.
    """
    try:
        yield
    except OtherProcessError:  # whose own message says so
        raise
    except kind as error:
        raise kind(f"{error}, {_how_to_go_on(folder)}") from error


def _how_to_go_on(folder: Path) -> str:
    """The end of a message: the newest checkpoint of a run, or that there is none."""
    found = latest(folder / "checkpoints")
    return f"then add --resume to go on from {found}" if found else "then start again"
