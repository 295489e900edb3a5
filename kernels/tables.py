"""Tables in device memory that let one launch go over every tensor of a model.

A kernel argument cannot hold hundreds of pointers, and a launch per tensor costs more than the work
on small tensors. So a launch gets four int64 tables instead:

    addresses [T, K]  data pointers; row = tensor, column = role (gradient of objective i,
                      parameter, state ...); 0 where a gradient is missing
    numels    [T]     elements of each tensor
    ids       [T]     the tensor's place in the caller's lists
    chunks    [C]     tensor << 32 | chunk: the unit of work, one 8-byte load

Tensors that a kernel cannot treat alike go to different tables: other dtypes (loads are typed) and
addresses that are no multiple of 16 (a 16-byte access there faults on the device, and neither the
interpreter nor the compiler notices). The split is made here, on the host, for 2 microseconds.

Uploads are keyed by their content. A table with other addresses is another table, so nothing ever
has to be invalidated, and a table that kernels may still read is never overwritten.

While a CUDA graph is captured, tables that were there before are used as they are; a new one is
copied by the graph, at every replay, from pinned memory that is never given back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Memory = TypeVar("_Memory")

ALIGNMENT = 16
MAX_CACHED_UPLOADS = 64

# Elements per chunk, by elements in the launch. Powers of two, so that the high 32 bits of an
# element's index are the same throughout a chunk. Small models get small chunks: every program of
# the persistent grid should have several, or the last wave of programs runs alone.
_CHUNKS = ((1 << 24, 4096), (1 << 26, 16384), (1 << 30, 32768))
_LARGEST_CHUNK = 65536

_uploads: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_read_by_graphs: list[object] = []


@dataclass(frozen=True)
class TensorTable:
    """What one launch works on; the file's header describes the tables.

    `dtypes` are those of the columns (that of a missing gradient is its row's), `chunk` is the
    number of elements per chunk, `aligned` says that every address is a multiple of 16, `missing`
    that some gradient is.
    """

    addresses: Tensor
    numels: Tensor
    ids: Tensor
    chunks: Tensor
    chunk: int
    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    missing: bool


def build(
    columns: Sequence[Sequence[Tensor | None]], optional: int, device: torch.device
) -> list[TensorTable]:
    """Tables of n tensors in K roles, one per combination of dtypes and alignment.

    Args:
        columns: K lists of n tensors on `device`. The K tensors of a row have equal shapes and
            element orders (equal strides, without gaps or overlaps).
        optional: the first `optional` columns are gradients: of one dtype per row, None (zeros)
            where missing. A row without any is in no table.
        device: where the tables go.
    Returns:
        Tables in an order that depends on dtypes and alignment only; empty tensors are in none.
    Raises:
        ValueError: a row whose tensors differ in size, or whose elements overlap or have gaps.
    """
    groups: dict[tuple[bool, tuple[str, ...]], list[int]] = {}
    dtypes: dict[tuple[str, ...], tuple[torch.dtype, ...]] = {}
    rows = list(zip(*columns, strict=True))
    sizes: list[int] = []
    addresses = np.array(
        [0 if t is None else t.data_ptr() for row in rows for t in row], dtype=np.int64
    ).reshape(len(rows), len(columns))
    aligned = (addresses % ALIGNMENT == 0).all(axis=1).tolist()
    for k, row in enumerate(rows):
        gradient = next((t for t in row[:optional] if t is not None), None)
        present = [t for t in row if t is not None]
        if optional and gradient is None:
            sizes.append(0)
            continue
        sizes.append(_common_size(present, k))
        of_row = tuple((t if t is not None else present[0]).dtype for t in row)
        names = tuple(map(str, of_row))
        dtypes[names] = of_row
        if sizes[k]:
            groups.setdefault((not aligned[k], names), []).append(k)
    tables = []
    for (misaligned, names), members in sorted(groups.items()):
        numels = tuple(sizes[k] for k in members)
        chunk = chunk_size(sum(numels))
        tables.append(
            TensorTable(
                addresses=upload(addresses[members], device),
                numels=upload(np.array(numels, dtype=np.int64), device),
                ids=upload(np.array(members, dtype=np.int64), device),
                chunks=upload(chunk_map(numels, chunk), device, (numels, chunk)),
                chunk=chunk,
                dtypes=dtypes[names],
                aligned=not misaligned,
                missing=bool((addresses[members] == 0).any()),
            )
        )
    return tables


def chunk_size(total: int) -> int:
    """Elements per chunk for a launch over `total` elements; never tuned (it fixes sum orders)."""
    return next((chunk for limit, chunk in _CHUNKS if total <= limit), _LARGEST_CHUNK)


@lru_cache(maxsize=MAX_CACHED_UPLOADS)
def chunk_map(numels: tuple[int, ...], chunk: int) -> np.ndarray:
    """int64 [C]: tensor << 32 | chunk, for every chunk of every tensor in order."""
    sizes = np.array(numels, dtype=np.int64)
    counts = -(-sizes // chunk)
    tensors = np.repeat(np.arange(len(sizes), dtype=np.int64), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return (tensors << 32) | (np.arange(int(counts.sum()), dtype=np.int64) - starts)


def upload(table: np.ndarray, device: torch.device, content: object = None) -> Tensor:
    """An immutable copy of `table` on the device, shared by all calls with equal content.

    `content` is a short key that determines the table, where there is one; else its bytes are.
    The copy is asynchronous, through pinned memory that torch's host allocator keeps until the
    copy has run. The current stream is part of the key: on another stream the copy might not have
    arrived yet.
    """
    content = (table.shape, table.dtype.str, table.tobytes()) if content is None else content
    if capturing(device):
        ready = (t for (d, _, c), t in _uploads.items() if (d, c) == (device, content))
        found = next(ready, None)
        return keep_for_graph(
            to_device(torch.from_numpy(table), device) if found is None else found
        )
    key = (device, stream_of(device), content)
    found = _uploads.get(key)
    if found is None:
        found = _uploads[key] = to_device(torch.from_numpy(table.copy()), device)
        if len(_uploads) > MAX_CACHED_UPLOADS:
            _uploads.popitem(last=False)
    _uploads.move_to_end(key)
    return found


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, copied without waiting for the device if it is on the CPU."""
    if device.type == "cuda" and values.is_cpu:
        pinned = values.pin_memory()
        if capturing(device):
            keep_for_graph(pinned)
        return pinned.to(device, non_blocking=True)
    return values.to(device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what the current stream is given."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_for_graph(memory: _Memory) -> _Memory:
    """Keep what a captured graph reads at every replay; for good, as graphs do not say they end."""
    _read_by_graphs.append(memory)
    return memory


def stream_of(device: torch.device) -> int:
    """The current stream; what was copied on another one might not have arrived yet."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one: Triton launches there, not where the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def architecture(device: torch.device) -> int:
    """The compute capability as in sm_90; of the interpreter, that of the oldest card supported."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def programs(device: torch.device, per_multiprocessor: int) -> int:
    """Size of a persistent grid: the programs that are resident at one time."""
    if device.type != "cuda":
        return per_multiprocessor
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * per_multiprocessor


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each address once, in any order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors of one shape hold their elements in the same order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size <= 1 or of_a == of_b for size, of_a, of_b in strides)


def _common_size(tensors: Sequence[Tensor], k: int) -> int:
    """The number of elements of row k, after the checks that a launch relies on."""
    first = tensors[0]
    for t in tensors:
        if t.numel() != first.numel():
            raise ValueError(
                f"tensors number {k} must have equal sizes, got {first.numel()} and {t.numel()}"
            )
        if not (t.is_contiguous() or is_dense(t)):
            raise ValueError(
                f"tensor number {k} must fill one stretch of memory, got shape {list(t.shape)} "
                f"with strides {list(t.stride())}; pass t.contiguous()"
            )
    return first.numel()
