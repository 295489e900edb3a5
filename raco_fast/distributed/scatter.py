"""`Scatter`: m gradients of a layer go to those who hold their shards, while the next layer's form.

A collecting pass forms the m gradients of whole parameters, one layer at a time. Each goes out by m
reduce-scatters on contiguous slices, asynchronous, and their memory is free again when the next
layer's have been formed: besides the shards, two layers exist at one time. Small parameters (norms,
biases, adapters) are packed together, so that not each is m messages of its own.

    shards of FSDP2     rows: dimension 0 in equal parts, the last ones padded
    replicas            elements: the flattened gradient in equal parts
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import is_dtensor, share
from raco_fast.distributed.processes import Processes, reduce_scatter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Sink: TypeAlias = Callable[[Tensor, Tensor], None]
"""(parameter, sums over processes [m, *part]): `part` is p's local shard, or a flat slice."""

_SMALL = 1 << 20  # bytes of m gradients below which a message of their own does not pay
_PACKED = 25 << 20  # bytes of a pack, as of DistributedDataParallel's buckets


@dataclass(frozen=True)
class Layout:
    """How a parameter's gradient is cut: `rows` of shape `row`, in `parts` of `chunk` rows each.

    `group`: who holds the parts (None: nobody else); `copies`: groups that hold the same part.
    """

    rows: int
    row: tuple[int, ...]
    parts: int
    group: ProcessGroup | None
    copies: tuple[ProcessGroup, ...]
    number: int  # of the part that stays here

    @property
    def chunk(self) -> int:
        """Rows of a part, padding included."""
        return math.ceil(self.rows / self.parts)

    @property
    def kept(self) -> int:
        """Rows that stay here."""
        return max(0, min(self.chunk, self.rows - self.number * self.chunk))

    @classmethod
    def of(cls, p: Tensor, processes: Processes) -> Layout:
        """As FSDP2 has sharded p; a plain tensor is a replica, cut by elements."""
        if not is_dtensor(p):
            return cls(p.numel(), (), processes.size, processes.group, (), processes.rank)
        mesh, group, parts, number, copies = p.device_mesh, None, 1, 0, []
        for dimension, placement in enumerate(p.placements):
            if placement.is_replicate():
                copies.append(mesh.get_group(dimension))
            else:
                group, parts = mesh.get_group(dimension), mesh.size(dimension)
                number = mesh.get_local_rank(dimension)
        return cls(p.shape[0], tuple(p.shape[1:]), parts, group, tuple(copies), number)


def obstacle(p: Tensor) -> str | None:
    """Why p's gradients cannot be scattered; None if they can."""
    if not is_dtensor(p):
        return None
    from torch.distributed.tensor import Shard

    cuts = [placement for placement in p.placements if not placement.is_replicate()]
    if len(cuts) <= 1 and all(type(cut) is Shard and cut.dim == 0 for cut in cuts):
        return None
    return (
        f"a parameter of shape {list(p.shape)} is sharded as {p.placements}, and only rows can be "
        f"scattered (FSDP2 and HSDP by default, without tensor parallelism)"
    )


def counted(p: Tensor, processes: Processes) -> float:
    """How much products of what stays here of p count in a sum over processes."""
    return share(p, processes.size) if is_dtensor(p) else 1.0  # slices of replicas: each once


class Scatter:
    """The m gradients of a pass on their way to their shards. All processes send alike.

    Args:
        m: the number of objectives.
        uses: how many layers use each parameter; it is sent after the last.
        leaves: parameter -> the tensor that the graph has in its place, on the device to send from.
        sink: takes what stays here.
        processes: those that hold the replicas.
    """

    def __init__(
        self,
        m: int,
        uses: Mapping[Tensor, int],
        leaves: Mapping[Tensor, Tensor],
        sink: Sink,
        processes: Processes,
    ) -> None:
        self._m, self._uses, self._leaves = m, dict(uses), leaves
        self._sink, self._processes = sink, processes
        self._layouts: dict[Tensor, Layout] = {}
        self._held: dict[Tensor, Tensor] = {}
        self._in_flight: list[Callable[[], None]] = []
        self._packs: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
        self._packed: Counter[Hashable] = Counter()  # bytes of each

    def buffers(self, p: Tensor) -> tuple[Tensor, bool]:
        """([m, *shape] of the whole parameter to add to, whether it is to be overwritten)."""
        fresh = p not in self._held
        layout = self._layout(p)
        if fresh:
            shape = (self._m, layout.parts * layout.chunk, *layout.row)
            device = self._leaves[p].device
            self._held[p] = held = torch.empty(shape, dtype=p.dtype, device=device)
            held[:, layout.rows :].zero_()
        return self._held[p][:, : layout.rows].view(self._m, *p.shape), fresh

    def filled(self, params: Iterable[Tensor]) -> None:
        """Send what a layer has added to for the last time; the layer before has arrived then."""
        done = []
        for p in params:
            self._uses[p] -= 1
            if self._uses[p] == 0:
                done.append(p)
        if done:
            self._arrive()
        for p in done:
            self._send(p, self._held.pop(p))

    def finish(self) -> None:
        """Send the rest; everything has arrived when this returns."""
        for p in list(self._held):  # a use of it has had no gradient
            self._send(p, self._held.pop(p))
        for key in list(self._packs):
            self._send_pack(key)
        self._arrive()

    def _layout(self, p: Tensor) -> Layout:
        if p not in self._layouts:
            self._layouts[p] = Layout.of(p, self._processes)
        return self._layouts[p]

    def _send(self, p: Tensor, held: Tensor) -> None:
        layout = self._layout(p)
        if held.numel() * held.element_size() >= _SMALL:
            out = held.new_empty(self._m, layout.chunk, *layout.row)
            works = [_reduce_scatter(o, h, layout.group) for o, h in zip(out, held, strict=True)]
            self._in_flight.append(partial(self._deliver, works, out, [(p, out)], held))
            return
        key = (layout.group, layout.copies, held.dtype, held.device)
        self._packs.setdefault(key, []).append((p, held))
        self._packed[key] += held.numel() * held.element_size()
        if self._packed[key] >= _PACKED:
            self._send_pack(key)

    def _send_pack(self, key: Hashable) -> None:
        """One message: of each part all objectives' gradients of all the parameters."""
        pack = self._packs.pop(key)
        del self._packed[key]
        layouts = [self._layout(p) for p, _ in pack]
        parts = layouts[0].parts
        joined = torch.cat(
            [held.view(self._m, parts, -1).transpose(0, 1).reshape(parts, -1) for _, held in pack],
            dim=1,
        )
        out = joined.new_empty(joined.shape[1])
        work = _reduce_scatter(out, joined.view(-1), layouts[0].group)
        shapes = [(self._m, layout.chunk, *layout.row) for layout in layouts]
        pieces = torch.split(out, [math.prod(shape) for shape in shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        params = [p for p, _ in pack]
        delivered = list(zip(params, views, strict=True))
        self._in_flight.append(partial(self._deliver, [work], out, delivered, joined))

    def _deliver(
        self, works: list[Any], out: Tensor, parts: list[tuple[Tensor, Tensor]], sent: Tensor
    ) -> None:
        """Wait for a message, whose memory `sent` is free then, and hand over what it brought."""
        for work in works:
            if work is not None:
                work.wait()
        for group in self._layout(parts[0][0]).copies:
            torch.distributed.all_reduce(out, group=group)
        for p, part in parts:
            self._sink(p, part[:, : self._layout(p).kept])

    def _arrive(self) -> None:
        while self._in_flight:
            self._in_flight.pop(0)()


def _reduce_scatter(out: Tensor, whole: Tensor, group: ProcessGroup | None) -> Any:
    """Begin to write this process's part of the sum to `out`."""
    if group is None:
        out.view(-1).copy_(whole.view(-1))
        return None
    return reduce_scatter(out, whole, group)
