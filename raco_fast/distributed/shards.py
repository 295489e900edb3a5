"""Which elements of a whole parameter lie on this process.

Stochastic rounding hashes an element's number in the whole parameter, so that a run on shards does
not depend on how many processes share them.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from raco_fast.backends.rounding import Place
from raco_fast.distributed.dtensor import any_dtensor, is_dtensor, local

_known = WeakIdKeyDictionary()
"""DTensor parameter -> where its shard lies."""


def places_of(params: Sequence[Tensor]) -> list[Place]:
    """`place_of` of each, by its place among them; [] where all are whole and contiguous."""
    if not any_dtensor(params):
        return []
    for p in params:
        if p not in _known:
            _known[p] = place_of(p, 0)
    return [replace(_known[p], tensor=k) for k, p in enumerate(params)]


def place_of(t: Tensor, number: int) -> Place:
    """Where the part of `t` that lies on this process lies in the whole.

    Args:
        t: a parameter: a DTensor, or a plain tensor, which is whole.
        number: of the whole tensor, the same on every process.
    Returns:
        The place for `Rounding.places`; that of an empty shard says nothing.
    Raises:
        ValueError: placements, of whatever sizes, whose shards are no rectangles of rows (raised on
            every process), or a shard that is not contiguous in memory.
    """
    if not is_dtensor(t):
        return Place(number)
    if not _in_rows(t):
        raise _refusal(t, "placements that cut dimension 0 and at most one more, in single pieces")
    part = local(t)
    if part.numel() == 0:
        return Place(number)
    if not part.is_contiguous():
        raise _refusal(t, f"shards that are contiguous in memory, got strides {part.stride()}")
    (chunk,) = t.__create_chunk_list__()  # type: ignore[no-untyped-call]
    shape, sizes = t.shape, chunk.sizes
    cut = [i for i, size in enumerate(sizes) if size != shape[i]]
    offset = sum(first * prod(shape[i + 1 :]) for i, first in enumerate(chunk.offsets))
    width = prod(sizes[max(cut, default=0) :])
    if width == part.numel():
        return Place(number, offset)
    return Place(number, offset, width, prod(shape[cut[-1] :]))


def _in_rows(t: Any) -> bool:
    """Whether every shard is a run of elements or equally long rows, by the placements alone.

    Sizes must not decide: an uneven shard may be simpler than those of the other processes, which
    would wait for this one after raising.
    """
    cut = set()
    pieces: dict[int, int] = {}  # of each dimension, by the placements further right
    for placement, size in reversed([*zip(t.placements, t.device_mesh.shape, strict=True)]):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        # FSDP2 cuts what tensor parallelism has cut already, and says so in a `split_factor`. With
        # any other one a shard has rows from here and there.
        if dim is None or getattr(placement, "split_factor", 1) not in (1, pieces.get(dim, 1)):
            return False
        pieces[dim] = pieces.get(dim, 1) * size
        if size > 1:
            cut.add(dim)
    return len(cut - {0}) <= 1


def _refusal(t: Any, rule: str) -> ValueError:
    return ValueError(
        f"rounding='stochastic' needs {rule}, got {t.placements} for a parameter of shape "
        f"{list(t.shape)} on {t.device_mesh}; use rounding='split' or 'nearest'"
    )
