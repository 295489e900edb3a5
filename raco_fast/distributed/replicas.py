"""Gradients of replicas: summed over processes in slices, one slice each, and their combination.

Replicas are plain tensors, whole on every process. A backward pass over several objectives leaves
each process with its own m gradients. What a step needs of their sums is a Gram matrix and one
combination, so nobody gets all m sums:

    reduce-scatter   m gradients, in buckets                   m |θ|
    Gram             of the slices, all-reduced                m (m + 1) / 2 numbers
    all-gather       the combination of the slices             1 |θ|

Buckets are as large as those of DistributedDataParallel: of many small tensors (an adapter's) not
each is a message of its own, and a large one is sent in pieces, whose copies need little memory.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.backends.types import Gradients
from raco_fast.distributed.dtensor import is_dtensor
from raco_fast.distributed.processes import Processes, reduce_scatter

BUCKET_BYTES = 25 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_IN_FLIGHT = 2  # buckets whose copies exist at one time


@dataclass(frozen=True)
class _Bucket:
    """Pieces (k, start, stop): elements start:stop of tensor k; `length`: of each slice."""

    pieces: list[tuple[int, int, int]]
    length: int


def check_replicas(params: Sequence[Tensor], processes: Processes) -> None:
    """Raise unless all processes have the same parameters bit by bit; of DTensors, the same shapes.

    Raises:
        RuntimeError: they differ, on all processes: these are no replicas, or no longer.
    """
    layout = zlib.crc32(repr([(tuple(p.shape), p.dtype) for p in params]).encode())
    if processes.alike(torch.tensor([len(params), layout], dtype=torch.float64)):
        values = torch.stack([_checksum(p) for p in params]).cpu().double()
        if processes.alike(values):
            return
        what = "the same values"
    else:
        what = "the same number of parameters with the same shapes and dtypes"
    raise RuntimeError(
        f"the processes must begin with {what}, and do not, so their gradients cannot be averaged. "
        f"Load or initialise them alike (the same seed, or DistributedDataParallel, which sends "
        f"those of process 0). Where each process holds a part of the model, use fully_shard "
        f"(FSDP2) or DTensors: FullyShardedDataParallel (FSDP1), ZeRO stages and pipelines keep "
        f"parts that this optimizer cannot see. Independent runs: process_group=None"
    )


def _checksum(p: Tensor) -> Tensor:
    """A sum of a parameter's bits, below 2^52: exact in any order, unlike one of its values."""
    if is_dtensor(p):
        return torch.zeros((), dtype=torch.int64)
    bits = (torch.view_as_real(p.detach()) if p.is_complex() else p.detach()).view(
        _INTEGERS[p.element_size() // (2 if p.is_complex() else 1)]
    )
    return (bits.sum(dtype=torch.int64) % (1 << 52)).cpu()


class ReplicaSums:
    """m lists of n gradients, summed over the processes; this process has a slice of each bucket.

    All processes give lists for the same parameters, and wait for each other.

    Args:
        params: n plain tensors.
        grads: of each objective, this process's own; None where it has none.
        processes: those that train together.

    Attributes:
        slices: m lists of flat tensors, one of each bucket; None where no process has a gradient.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Gradients,
        processes: Processes,
    ) -> None:
        self._params, self._processes = params, processes
        here = torch.tensor([[g is not None for g in one] for one in grads], dtype=torch.int32)
        present = processes.largest(here).bool().tolist()
        self._buckets = list(_buckets(params, processes.size))
        self.slices: list[list[Tensor | None]] = [[] for _ in grads]
        under_way: list[tuple[Any, Tensor]] = []
        for bucket in self._buckets:
            numbers = {k for k, _, _ in bucket.pieces}
            for one, there, slices in zip(grads, present, self.slices, strict=True):
                if not any(there[k] for k in numbers):
                    slices.append(None)
                    continue
                flat = self._joined(one, bucket)
                slice_ = flat.new_empty(bucket.length)
                slices.append(slice_)
                under_way.append((reduce_scatter(slice_, flat, processes.group), flat))
            while len(under_way) > _IN_FLIGHT * len(grads):
                under_way.pop(0)[0].wait()
        for work, _ in under_way:
            work.wait()

    def cut(self) -> tuple[list[list[Tensor | None]], list[tuple[int, int, int]]]:
        """The slices cut where tensors end, as views, and the place of each part.

        Returns:
            (m lists of n flat tensors, n places (k, start, stop): elements start:stop of tensor k).
        """
        grads: list[list[Tensor | None]] = [[] for _ in self.slices]
        places = []
        for number, bucket in enumerate(self._buckets):
            first = bucket.length * self._processes.rank
            at = -first  # of a piece in this process's slice
            for k, start, stop in bucket.pieces:
                low, high = max(at, 0), min(at + stop - start, bucket.length)
                if low < high:
                    places.append((k, start + low - at, start + high - at))
                    for one, slices in zip(grads, self.slices, strict=True):
                        whole = slices[number]
                        one.append(None if whole is None else whole[low:high])
                at += stop - start
        return grads, places

    def combined(self, coefficients: Tensor, *, wide: bool) -> list[Tensor]:
        """Σ α_i g_i of every parameter, of the sums over processes, the same bits on all.

        Args:
            coefficients: float64 [m] on the CPU.
            wide: 16-bit gradients have a float32 combination, as a step on one process forms it;
                it is sent as such.
        """
        dtypes = [_widened(p.dtype) if wide else p.dtype for p in self._params]
        out = [
            torch.empty(p.shape, dtype=dtype, device=p.device)
            for p, dtype in zip(self._params, dtypes, strict=True)
        ]
        for number, bucket in enumerate(self._buckets):
            column = [slices[number] for slices in self.slices]
            like = next(s for s in column if s is not None)
            mine = torch.empty_like(like, dtype=_widened(like.dtype) if wide else like.dtype)
            ops.combine([[s] for s in column], coefficients, [mine])
            whole = mine.new_empty(bucket.length * self._processes.size)
            self._processes.gather(whole, mine)
            at = 0
            for k, start, stop in bucket.pieces:
                flat_of(out[k])[start:stop] = whole[at : at + stop - start]
                at += stop - start
        return [_laid_out_like(p, g) for p, g in zip(self._params, out, strict=True)]

    def _joined(self, grads: Sequence[Tensor | None], bucket: _Bucket) -> Tensor:
        """A bucket's pieces one after the other, then zeros: as long as all slices together."""
        parts = []
        for k, start, stop in bucket.pieces:
            g = grads[k]
            flat = flat_of(self._params[k] if g is None else g)[start:stop]
            parts.append(torch.zeros_like(flat) if g is None else flat)
        padding = bucket.length * self._processes.size - sum(map(len, parts))
        if padding:
            parts.append(parts[0].new_zeros(padding))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _buckets(params: Sequence[Tensor], size: int) -> Iterator[_Bucket]:
    """Cut all parameters, in their order, into buckets of one kind of memory each."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for k, p in enumerate(params):
        kinds.setdefault((p.device, p.dtype), []).append(k)
    for (_, dtype), numbers in kinds.items():
        # Equal slices without padding, and a large tensor's pieces are views, not copies.
        capacity = max(1, BUCKET_BYTES // dtype.itemsize // size) * size
        pieces: list[tuple[int, int, int]] = []
        room = capacity
        for k in numbers:
            start, length = 0, flat_of(params[k]).numel()
            while start < length:
                stop = min(length, start + room)
                pieces.append((k, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield _Bucket(pieces, capacity // size)
                    pieces, room = [], capacity
        if pieces:
            yield _Bucket(pieces, -((room - capacity) // size))


def averages(
    params: Sequence[Tensor], own: Sequence[Tensor | None], processes: Processes
) -> list[Tensor | None]:
    """The averages of one gradient of each replica; None where no process has one."""
    here = torch.tensor([g is not None for g in own], dtype=torch.int32)
    there = processes.largest(here).bool().tolist()
    kept = [k for k, found in enumerate(there) if found]
    out: list[Tensor | None] = [None] * len(params)
    if kept:
        sums = ReplicaSums([params[k] for k in kept], [[own[k] for k in kept]], processes)
        mean = torch.full((1,), 1.0 / processes.size, dtype=torch.float64)
        for k, g in zip(kept, sums.combined(mean, wide=False), strict=True):
            out[k] = g
    return out


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _laid_out_like(p: Tensor, g: Tensor) -> Tensor:
    if p.is_contiguous():
        return g
    return torch.empty_like(p, dtype=g.dtype, requires_grad=False).copy_(g)


def flat_of(t: Tensor) -> Tensor:
    """Its elements in their logical order, as pairs where they are complex; a view if possible."""
    t = t.detach()
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1)
