"""A matrix cut into shards, and where each lies in it."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from raco_fast.backends.rounding import Place

CUTS = {
    "rows": ([0.0, 0.3, 1.0], [0.0, 1.0]),
    "columns": ([0.0, 1.0], [0.0, 0.01, 0.6, 1.0]),
    "rows and columns": ([0.0, 0.5, 0.5, 1.0], [0.0, 0.4, 1.0]),
}
"""The edges of rows and of columns, as shares of all of them."""

BEYOND_32_BITS = [
    Place(4, 2**32 - 700),
    Place(4, 3 * 2**32 - 211, 10, 13),
    Place(2**20, 2**33 - 90, 1, 7),
    Place(0, 2**32 - 40_000, 300, 40_000),
    Place(1, 12, 5, 2**31 + 3),
    Place(6, 5 * 2**32 + 9, 100_000, 100_001),
]
"""All but the last cross a multiple of 2^32: in a run, in a row, or between two rows."""


def shards(whole: Tensor, cut: str, number: int) -> list[tuple[tuple[slice, slice], Place]]:
    """The index of each shard of a matrix, and its place."""
    edges = [
        [int(share * size) for share in shares]
        for shares, size in zip(CUTS[cut], whole.shape, strict=True)
    ]
    pitch = whole.shape[1]
    return [
        (
            (slice(top, bottom), slice(left, right)),
            Place(number, top * pitch + left, right - left, pitch),
        )
        for top, bottom in pairwise(edges[0])
        for left, right in pairwise(edges[1])
    ]
