"""Which sequences the rows of a forward pass belong to, as `sequences` declares it.

A row may belong to two sequences, as the tokens of a prompt do that both responses of a pair
continue. Its dY is then the sum over both, which is exact as long as both have their gradients in
one group (`sequences.py`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Declared:
    """Which sequences the rows of a forward pass belong to, as `sequences` was told.

    `index`: int64 [n] on the CPU; `shared_with`: likewise a second sequence of each row, -1 where
    it has none, or None where no row has one.
    """

    index: Tensor
    shared_with: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def largest(self) -> int:
        """The largest number of a sequence."""
        both = [x for x in (self.index, self.shared_with) if x is not None and x.numel()]
        return max((int(x.max()) for x in both), default=-1)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The sequences that share rows."""
        if self.shared_with is None:
            return []
        both = torch.stack([self.index, self.shared_with])[:, self.shared_with >= 0]
        return [(int(a), int(b)) for a, b in torch.unique(both, dim=1).T]

    def of_rows(self, of_sequences: Tensor) -> Tensor:
        """[n]: of each row, the larger of what its sequences have, such as their group."""
        first = of_sequences[self.index]
        if self.shared_with is None:
            return first
        second = of_sequences[self.shared_with.clamp(min=0)]
        return torch.where(self.shared_with >= 0, torch.maximum(first, second), first)


_declared: ContextVar[Declared | None] = ContextVar("raco_fast_sequences", default=None)


@contextmanager
def sequences(
    index: Sequence[int] | Tensor | None = None,
    *,
    shared_with: Sequence[int] | Tensor | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> Iterator[None]:
    """Say which sequence the rows of a forward pass belong to, if row b is not sequence b.

    Without it, entry b of a layer's leading dimension belongs to scores[b].

        rows = raco_fast.dpo.pair_rows(prompt_ids, a_ids, b_ids)   # [prompt | a | b] of each pair
        with raco_fast.sequences(rows.sequence, shared_with=rows.shared_with):
            hidden = decoder(rows.input_ids, ...)

    Args:
        index: [n] sequence of each entry of the leading dimension, or, where several leading
            dimensions hold the rows ([1, tokens] packed), of each row.
        shared_with: [n] a second sequence that a row belongs to, -1 for none: of a prompt that two
            responses continue, say. One backward pass is exact for such a row where the losses see
            its two sequences as a pair, each through the same h(a) - h(b); where they do not,
            `backward` says so and takes one pass per objective.
        cu_seqlens: [S + 1] offsets of S sequences packed into one row of tokens, from 0, as
            flash-attention's `cu_seqlens`; stands for the index of each token.
    Raises:
        ValueError: neither or both of `index` and `cu_seqlens` are given, offsets that do not grow
            from 0, a negative index, `shared_with` of another length or below -1.
    """
    if (index is None) == (cu_seqlens is None):
        raise ValueError(
            "`sequences` takes either `index` or `cu_seqlens`; give the sequence of each row, or "
            "the offsets of packed sequences"
        )
    rows = _packed(cu_seqlens) if index is None else torch.as_tensor(index).reshape(-1).long()
    rows = rows.cpu()  # once: every layer looks at it
    if rows.numel() and int(rows.min()) < 0:
        raise ValueError(
            f"`index` must hold positions in `scores`, from 0, got {int(rows.min())}; number the "
            f"sequences as the scores are ordered"
        )
    token = _declared.set(Declared(rows, _second(shared_with, rows)))
    try:
        yield
    finally:
        _declared.reset(token)


def _second(shared_with: Sequence[int] | Tensor | None, index: Tensor) -> Tensor | None:
    if shared_with is None:
        return None
    second = torch.as_tensor(shared_with).reshape(-1).long().cpu()
    if second.shape != index.shape or (second.numel() and int(second.min()) < -1):
        lowest = int(second.min()) if second.numel() else -1
        raise ValueError(
            f"`shared_with` must hold a sequence, or -1, for each of the {len(index)} rows "
            f"of `index`, got {len(second)} from {lowest}; give -1 to rows of one sequence"
        )
    return second if bool((second >= 0).any()) else None


def declared() -> Declared | None:
    """What `sequences` declares for the forward pass under way."""
    return _declared.get()


def _packed(cu_seqlens: Sequence[int] | Tensor | None) -> Tensor:
    offsets = torch.as_tensor(cu_seqlens).reshape(-1).long()
    lengths = offsets.diff()
    if offsets.numel() < 2 or int(offsets[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError(
            f"`cu_seqlens` must hold offsets that grow from 0 to the number of tokens, got "
            f"{offsets.tolist()[:8]}; build it as [0, *cumulative lengths]"
        )
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)


Entries: TypeAlias = tuple[Declared | None, int]
"""(The sequences of each entry of a layer, None where entry b is sequence b; how often the entries
are repeated by dimensions before theirs.)"""


class MisfitError(ValueError):
    """The rows of a layer cannot be told apart by sequence."""


def entries(
    layer: str,
    shape: Sequence[int],
    index: Declared | None,
    n_scores: int,
    length: int | None = None,
) -> Entries:
    """How the rows of a layer are told apart by sequence.

    Args:
        layer: its name, for messages.
        shape: of its input.
        index: what `sequences` declared for the call.
        n_scores: how many sequences there are.
        length: tokens of each sequence, as other layers have them: [n_scores * length, d] holds one
            sequence after the other.
    Raises:
        MisfitError: the rows cannot be told apart by sequence.
        ValueError: a declared sequence that has no score.
    """
    if index is None:
        flat = length is not None and len(shape) == 2 and shape[0] == n_scores * length
        if not flat and (not shape or shape[0] != n_scores):
            raise MisfitError(
                f"`scores` has {n_scores} sequences, but the input of layer {layer!r} has "
                f"shape {tuple(shape)}, so its rows cannot be told apart; score the rows of one "
                f"batch in their order, or declare them with `raco_fast.sequences` around the "
                f"forward pass"
            )
        return None, 1
    n = len(index)
    leading = [math.prod(shape[:k]) for k in range(1, len(shape) + 1)]
    behind = shape[2:-1] if shape[0] == 1 else ()  # tokens behind the heads: [1, heads, tokens, d]
    if (n in leading) == (n in behind):
        raise MisfitError(
            f"`sequences` declared {n} rows, but the input of layer {layer!r} has shape "
            f"{tuple(shape)}; give one index for each of its rows"
        )
    if index.largest >= n_scores:
        raise ValueError(
            f"`sequences` declared sequence {index.largest}, but there are {n_scores} "
            f"`scores`; number them from 0"
        )
    return index, 1 if n in leading else math.prod(shape[: 2 + behind.index(n)])
