"""The batches of the coming steps, packed while the model is busy with this one.

torch's `DataLoader` does it. What a worker makes is sent as bytes: tensors would be shared one by
one, each with an open file, and a step of many micro-batches has more of them than a process may
open. They become tensors again, and pinned, in the loader's own thread.
"""

from __future__ import annotations

import pickle
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from io import BytesIO
from os import environ
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

Batch = TypeVar("Batch")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StepBatches(Generic[Batch]):
    """Context in which `next()` gives the batches of one step after the other.

        with StepBatches(make, range(first, total), device) as batches:
            for batches_of_step in batches: ...

    Which batches, and in which order, does not depend on the workers, and torch's random numbers
    stay as they are. Where the block is left early, workers end with it.

    Args:
        make: step -> its batches on the CPU: dataclasses (lists and dictionaries of them) whose
            fields are tensors and what else can be pickled.
        steps: the numbers of the steps.
        device: where the step runs. Of a GPU, the tensors are pinned, so that
            `.to(device, non_blocking=True)` waits for nothing.
        workers: processes that call `make`, ahead of the steps; 0 calls it when the step is due.
            None: 1 for a GPU, which computes meanwhile; 0 for the CPU, whose cores are busy with
            the step.
        ahead: steps that are held ready by each worker.
    Raises:
        ChildProcessError: by `next()`: a worker was killed.
        ValueError: and whatever else `make` raises; from a worker, with its traceback as a text.
    """

    def __init__(
        self,
        make: Callable[[int], Sequence[Batch]],
        steps: range,
        device: torch.device,
        workers: int | None = None,
        ahead: int = 2,
    ) -> None:
        pins = device.type == "cuda"
        workers = int(pins) if workers is None else workers
        self._loader: DataLoader[Any] = DataLoader(
            _Steps(make, pins),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pins and workers > 0,
            worker_init_fn=_begin_worker,
            # A worker that is started anew would run the user's script again to find `make`.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # torch's own would be drawn from
            prefetch_factor=ahead if workers else None,
        )
        self._batches: Iterator[Any] | None = None

    def __enter__(self) -> StepBatches[Batch]:
        with _quiet_fork():
            self._batches = iter(self._loader)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._batches = None  # the loader ends its workers when its iterator goes

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        assert self._batches is not None, "used outside of its block"
        try:
            batches = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise ChildProcessError(
                f"the process that packs the pairs of the coming steps has ended ({error}); "
                f"memory may have run out: set `workers` to 0, or use a machine with more"
            ) from error
        return list(batches.opened() if isinstance(batches, _Sent) else batches)


class _Steps(Dataset[Any]):
    """Step -> batches, as `DataLoader` asks for them."""

    def __init__(self, make: Callable[[int], Sequence[Any]], pins: bool) -> None:
        self._make, self._pins = make, pins

    def __getitem__(self, step: int) -> Any:
        batches = list(self._make(step))
        if get_worker_info() is not None:
            return _Sent(batches)
        return pinned(batches) if self._pins else batches


class _Pickler(pickle.Pickler):
    """Tensors by way of numpy: torch makes an archive of each, which takes thirty times longer."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.dtype is torch.bfloat16:  # which numpy does not have
            return NotImplemented
        return torch.from_numpy, (value.numpy(),)


class _Sent:
    """Batches on the way from a worker."""

    def __init__(self, batches: list[Any]) -> None:
        memory = BytesIO()
        _Pickler(memory, pickle.HIGHEST_PROTOCOL).dump(batches)
        self._data = memory.getvalue()

    def opened(self) -> list[Any]:
        """The batches."""
        return pickle.loads(self._data)  # type: ignore[no-any-return]

    def pin_memory(self) -> list[Any]:
        """Called by `DataLoader`, in a thread."""
        return pinned(self.opened())


def pinned(value: Batch) -> Batch:
    """The same with every tensor in pinned memory; of lists, dictionaries and dataclasses."""
    found: Any = value
    if isinstance(value, Tensor):
        found = value.pin_memory()
    elif isinstance(value, (list, tuple)):
        found = type(value)(map(pinned, value))
    elif isinstance(value, dict):
        found = {key: pinned(inner) for key, inner in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        # Not by its constructor, which may do more than to set its fields.
        found = object.__new__(type(value))
        for field in fields(value):
            object.__setattr__(found, field.name, pinned(getattr(value, field.name)))
    return found  # type: ignore[no-any-return]


def _as_it_is(batches: Any) -> Any:
    return batches


def _begin_worker(worker: int) -> None:
    """Signals are the run's to answer, which launchers and terminals send to all its processes.

    A worker that one of them ends would end the run before it has saved. It ends with the loader,
    and a few seconds after a run that is killed.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Without what is said of forks that use threads or tokenizers, which workers do not."""
    known, before = "TOKENIZERS_PARALLELISM", environ.get("TOKENIZERS_PARALLELISM")
    environ.setdefault(known, "true")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*use of fork\(\) may lead", DeprecationWarning)
            yield
    finally:
        if before is None:
            del environ[known]
