"""Counts what a process sends, at the collectives themselves."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALL_REDUCE = ("allreduce_", "all_reduce", "allreduce_coalesced_")
ONCE = (
    "_allgather_base_",
    "_reduce_scatter_base_",
    "all_gather_into_tensor",
    "allgather_",
    "allgather_into_tensor_coalesced_",
    "broadcast_",
    "reduce_scatter_",
    "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced_",
)
SILENT = ("barrier", "wait_tensor")


class Payload(TorchDispatchMode):
    """Bytes of the collectives inside the block, as a ring sends them with many processes.

    A reduce-scatter and an all-gather count their whole tensor once, an all-reduce twice. A
    collective that is not known here is an error, so none goes uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        library, _, rest = str(func).partition(".")
        name = rest.partition(".")[0]
        if library in ("c10d", "_c10d_functional") and name not in SILENT:
            assert name in ALL_REDUCE + ONCE, f"{func} is not counted"
            size = max(_bytes(a) for a in args)
            self.bytes += size * (2 if name in ALL_REDUCE else 1)
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
