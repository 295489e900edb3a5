"""`Processes`: those that train one model together, and how they decide alike.

A process that raises, skips or falls back while the others go on leaves them waiting in a
collective that never ends, or, worse, meets them in the wrong one. So whatever depends on a
process's own batch is decided by all of them (`agree`), and what has to be equal is compared
(`alike`). With one process nothing is sent, and nothing of torch.distributed is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GroupLike: TypeAlias = "ProcessGroup | Literal['world'] | None"
"""A process group; "world": all processes, once torch.distributed is initialised; None: this
process alone, beside independent ones."""


class OtherProcessError(ConnectionError):
    """Another process has failed, or is gone, so this one stops as well."""


class Processes:
    """The processes of one group, looked up at every use: it may be initialised later.

    Raises:
        TypeError: `process_group` is none of `GroupLike`.
        ValueError: this process does not belong to it.
    """

    def __init__(self, process_group: GroupLike = "world") -> None:
        if not (process_group is None or process_group == "world" or _is_group(process_group)):
            raise TypeError(
                f"`process_group` must be a torch.distributed process group, 'world' or None, got "
                f"{process_group!r}; give mesh.get_group() for one dimension of a mesh, and None "
                f"for runs that are independent of each other"
            )
        self._given = process_group
        if _is_group(process_group) and self.rank < 0:
            raise ValueError(
                "`process_group` must have this process in it, got a group of others; build the "
                "group that this process trains with, or give None"
            )

    @property
    def group(self) -> ProcessGroup | None:
        """The group; None where this process is alone."""
        if self._given != "world":
            return self._given
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.group.WORLD
        return None

    @property
    def size(self) -> int:
        """How many there are."""
        group = self.group
        return 1 if group is None else torch.distributed.get_world_size(group)

    @property
    def rank(self) -> int:
        """This one's number in the group."""
        group = self.group
        return 0 if group is None else torch.distributed.get_rank(group)

    @property
    def device(self) -> torch.device:
        """Where small tensors have to be to be sent: the CPU, if the group can."""
        if self.size > 1 and "cpu:" not in torch.distributed.get_backend_config(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the processes, the same bits on all, where `numbers` are."""
        return self._reduced(numbers, "SUM")

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest of each number; NaN counts as infinite."""
        known = numbers.nan_to_num(torch.inf) if numbers.is_floating_point() else numbers
        return self._reduced(known, "MAX")

    def alike(self, numbers: Tensor) -> bool:
        """Whether all processes have the same [n] float64, bit by bit but for kinds of NaN."""
        if self.size == 1:
            return True
        numbers = numbers.double().nan_to_num(torch.inf)
        first, last = self.largest(torch.stack([numbers, -numbers]))
        return bool((first == -last).all())

    def gather(self, out: Tensor, part: Tensor) -> None:
        """Write the parts of all processes to `out`, one after the other."""
        _collective("all_gather_single", "all_gather_into_tensor")(out, part, group=self.group)

    def agree(self, decide: Callable[[], Sequence[bool] | None], questions: int) -> list[bool]:
        """What any process decides; an error on one is raised on all.

        Args:
            decide: answers so many questions.
        Raises:
            OtherProcessError: `decide` has failed on another process (says which, and its error).
                Where it fails on this one, its own error is raised.
        """
        if self.size == 1:
            return list(decide() or [])
        failure, answers = None, [False] * questions
        try:
            answers = list(decide() or [])
        except (LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            failure = error
        bits = torch.tensor([failure is not None, *answers], dtype=torch.int64)
        failed, *heard = self.largest(bits).bool().tolist()
        if failed:
            self._raise(failure)
        return heard

    def say(self, words: str | None) -> str | None:
        """The first words of any process, in the order of their numbers; None if none has any."""
        if self.size == 1:
            return words
        if not bool(self.largest(torch.tensor([words is not None], dtype=torch.int64))):
            return None
        return next(said for said in self._gathered(words) if said is not None)

    def _raise(self, failure: Exception | None) -> None:
        told = self._gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        rank = next(r for r, said in enumerate(told) if said is not None)
        raise OtherProcessError(f"process {rank} of {self.size} has failed: {told[rank]}")

    def _gathered(self, words: str | None) -> list[str | None]:
        heard: list[str | None] = [None] * self.size
        torch.distributed.all_gather_object(heard, words, group=self.group)
        return heard

    def _reduced(self, numbers: Tensor, operation: str) -> Tensor:
        if self.size == 1:
            return numbers
        # A device that the group serves keeps its numbers: nothing waits for it then.
        stays = not numbers.is_cpu or self.device.type == "cpu"
        sent = numbers.clone() if stays else numbers.to(self.device)
        op = getattr(torch.distributed.ReduceOp, operation)
        torch.distributed.all_reduce(sent, op=op, group=self.group)
        return sent.to(numbers.device)

    def __reduce__(self) -> tuple[Any, ...]:
        if _is_group(self._given):
            raise TypeError(
                "an optimizer or gradients with a `process_group` of their own cannot be pickled; "
                "save their state_dict(), and build them anew with the group of the new run"
            )
        return Processes, (self._given,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return Processes(self._given)


def reduce_scatter(out: Tensor, whole: Tensor, group: ProcessGroup | None) -> Any:
    """Begin to write this process's part of the sum of `whole` to `out`; what to wait for."""
    send = _collective("reduce_scatter_single", "reduce_scatter_tensor")
    return send(out, whole, group=group, async_op=True)


def _collective(name: str, before: str) -> Any:
    """A function of torch.distributed: 2.11 lacks the name, 2.13 deprecates the one before."""
    return getattr(torch.distributed, name, None) or getattr(torch.distributed, before)


def _is_group(value: object) -> bool:
    distributed = torch.distributed
    return distributed.is_available() and isinstance(value, distributed.ProcessGroup)
