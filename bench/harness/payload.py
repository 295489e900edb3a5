"""What a process sends, counted where every collective passes: the operators of c10d.

Wrapped functions of torch.distributed would miss DistributedDataParallel, which calls from C++.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_TWICE = ("allreduce_", "allreduce_coalesced_", "all_reduce")
_ONCE = (
    *("allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_"),
    *("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"),
    *("broadcast_", "all_gather_into_tensor", "reduce_scatter_tensor"),
)
_NOTHING = ("barrier", "wait_tensor")


class Payload(TorchDispatchMode):
    """Counts the collectives inside a block, in all threads of its backward passes.

    An all-gather, a reduce-scatter and a broadcast send the whole tensor once, and an all-reduce
    sends it twice, as a ring of many processes does; of W processes each sends (W - 1) / W of that.

    Attributes:
        bytes: sent.
        messages: how many collectives.
    Raises:
        NotImplementedError: a collective whose bytes are not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.messages = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        library, _, name = func._schema.name.partition("::")
        if library in ("c10d", "_c10d_functional") and name not in _NOTHING:
            if name not in _ONCE + _TWICE:
                raise NotImplementedError(f"the bytes of {library}::{name} are not counted here")
            self.messages += 1
            self.bytes += max(map(_bytes, args)) * (2 if name in _TWICE else 1)
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0
