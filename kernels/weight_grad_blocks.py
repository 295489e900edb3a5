"""Rows of sequences as a table of k-blocks, the steps of the loop in `weight_grad.py`.

A sequence is a segment [start, stop) of the rows. A k-block is at most `block_k` rows of one
segment, so no block mixes sequences, and one flat loop over the table keeps its loads ahead of the
arithmetic across the ends of segments, which nested loops do not. One int64 per block:

    first row | valid rows << 32 | fold << 40 | column << 41

`fold` says that the sums take in what was accumulated, with the weights of that column. Tables are
built on the host and kept by their content: the layers of one model share them.

The direct form folds at the end of each segment. The running form never resets its accumulator:

    P_n = t_1 + ... + t_n,   G_i = Σ_n r_in t_n = Σ_n (r_in - r_i,n+1) P_n    (Abel summation)

with t_n the product of segment n under the seeds A_0n, and r_in = A_in / A_0n. It folds only where
the column of r changes. The weights are differences, so cancellation has to be kept off: segments
come in descending max |r_in| over i >= 1, and `running_ratios` refuses what that does not cure.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MAX_CACHED = 64
# Largest sum of |terms| over |result| that the running form may have: 5 bits of float32's 24.
MAX_CANCELLATION = 32.0


def running_ratios(coefficients: Tensor) -> Tensor | None:
    """The coefficients of the running form, for a backward pass seeded with `coefficients[0]`.

    Args:
        coefficients: [m, S], on the CPU.
    Returns:
        [m, S] float32, row i is A_i / A_0 (row 0 is ones); None where the running form would be
        undefined or inexact: some A_0n is zero, a ratio is not finite, or the differences would
        cancel by more than MAX_CANCELLATION if all sequences had gradients of one size.
    """
    A = coefficients.detach().double().numpy()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = (A / A[0]).astype(np.float32)
    if not np.isfinite(ratios).all():
        return None
    order = _descending(ratios, np.arange(A.shape[1]))
    size_of_running = np.abs(A[0, order]).cumsum()
    terms = np.abs(_steps(ratios[:, order])) @ size_of_running
    if (terms > MAX_CANCELLATION * np.abs(A[1:]).sum(axis=1)).any():
        return None
    return torch.from_numpy(ratios)


@lru_cache(maxsize=MAX_CACHED)
def direct_blocks(segments: tuple[int, ...], block_k: int) -> np.ndarray:
    """Table of the direct form: int64 [n], columns are segments; an empty segment has no block."""
    bounds = np.array(segments, dtype=np.int64)
    return _blocks(bounds[:-1], bounds[1:], np.ones(len(segments) - 1, dtype=np.int64), block_k)


@lru_cache(maxsize=MAX_CACHED)
def running_blocks(
    segments: tuple[int, ...], ratios: bytes, block_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Table and weights of the running form.

    Args:
        segments: S + 1 offsets.
        ratios: the bytes of [m, S] float32, first row ones.
        block_k: rows per block.
    Returns:
        int64 [n], whose columns are runs: neighbouring segments with equal ratios, in memory and in
        order, are one. And the weights: float32 [m - 1, runs].
    """
    bounds = np.array(segments, dtype=np.int64)
    r = np.frombuffer(ratios, dtype=np.float32).reshape(-1, len(segments) - 1)
    filled = np.flatnonzero(bounds[:-1] < bounds[1:])
    order = filled[_descending(r[:, filled], bounds[filled])]
    start, stop, r = bounds[order], bounds[order + 1], r[:, order]
    parted = (start[1:] != stop[:-1]) | (r[:, 1:] != r[:, :-1]).any(axis=0)
    n = len(order)
    is_first, is_last = np.append(True, parted)[:n], np.append(parted, True)[:n]
    steps = _steps(r[:, is_first])
    folds = (steps != 0).any(axis=0).astype(np.int64)
    return _blocks(start[is_first], stop[is_last], folds, block_k), steps


def _descending(ratios: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Order by falling max |r_in| over i >= 1; equal columns come together, by rows."""
    largest = np.abs(ratios[1:]).max(axis=0, initial=0.0)
    order: np.ndarray = np.lexsort((rows, *ratios[:0:-1], -largest))
    return order


def _steps(ratios: np.ndarray) -> np.ndarray:
    """r_in - r_i,n+1 for i >= 1, where nothing follows the last."""
    wide = ratios[1:].astype(np.float64)
    following = np.concatenate([wide[:, 1:], np.zeros_like(wide[:, :1])], axis=1)
    steps: np.ndarray = (wide - following).astype(np.float32)
    return steps


def _blocks(start: np.ndarray, stop: np.ndarray, folds: np.ndarray, block_k: int) -> np.ndarray:
    counts = -(-(stop - start) // block_k)
    column = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    place = np.arange(len(column), dtype=np.int64) - np.repeat(counts.cumsum() - counts, counts)
    row = start[column] + place * block_k
    valid = np.minimum(stop[column] - row, block_k)
    fold = np.where(place == counts[column] - 1, folds[column], 0)
    entries: np.ndarray = row | valid << 32 | fold << 40 | column << 41
    return entries
