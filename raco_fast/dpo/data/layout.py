"""`Layout`: which pairs of a step go through the model together, and how their tokens lie there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raco_fast.dpo.data.batches import pair_length, unlabelled
from raco_fast.dpo.data.collation import PairBatch, collate, pack
from raco_fast.dpo.data.packed_rows import row_length
from raco_fast.dpo.data.tokenization import EncodedPair

Kind = Literal["pairs", "packed", "padded"]

Round = list[list[EncodedPair]]
"""A micro-batch of each process, which all of them run at a time."""


@dataclass(frozen=True)
class Layout:
    """How pairs become micro-batches.

    Args:
        kind: "pairs", rows [prompt | a | b]; "packed", every response with its prompt to itself;
            "padded", right-padded to the longest.
        pairs: pairs of a padded micro-batch, at most.
        tokens: of a packed micro-batch, at most; a pair that is longer is alone.
        pad_id: token id of the padding.
    """

    kind: Kind
    pairs: int
    tokens: float
    pad_id: int

    def scaled(self, factor: int) -> Layout:
        """Micro-batches so many times as large, as scoring without a graph has room for."""
        return replace(self, pairs=self.pairs * factor, tokens=self.tokens * factor)

    def with_tokens(self, tokens: float) -> Layout:
        """With room for so many tokens."""
        return replace(self, tokens=tokens)

    def padded(self, pairs: int) -> Layout:
        """Padded, so many pairs at once."""
        return replace(self, kind="padded", pairs=pairs)

    def length(self, pair: EncodedPair) -> int:
        """Tokens of a row that a pair takes; of padded rows, of the longer of its two."""
        if self.kind == "padded":
            return pair_length(pair)
        share = self.kind == "pairs"
        return row_length(pair.prompt_ids, pair.a_ids, pair.b_ids, share=share)

    def batch(self, pairs: Sequence[EncodedPair]) -> PairBatch:
        """Pairs as the tensors of one micro-batch."""
        if self.kind == "padded":
            return collate(pairs, self.pad_id)
        return pack(pairs, share=self.kind == "pairs")

    def rounds(self, pairs: Sequence[EncodedPair], processes: int = 1) -> list[Round]:
        """Cut pairs into micro-batches of like length, longest first, for every process.

        Like length saves padding, and leaves the short ones to fill what long ones leave; with the
        longest first, what does not fit in memory fails at once. The pairs are dealt one by one in
        this order, there and back (0, 1, 1, 0, 0, ...): processes carry as many pairs, but for one,
        and their sums of lengths differ by at most the longest's.

        All processes have the same number of micro-batches, since sharded parameters are gathered
        in every forward pass. One that would have an empty one runs the shortest pair, unlabelled.

        Args:
            pairs: of the whole step; at least one.
            processes: that share the step.
        """
        by_length = sorted(pairs, key=lambda pair: (-self.length(pair), pair.id))
        turn = [*range(processes), *reversed(range(processes))]
        dealt: Round = [[] for _ in range(processes)]
        for k, pair in enumerate(by_length):
            dealt[turn[k % len(turn)]].append(pair)
        of_each = [self._cut(own) for own in dealt]
        count = max(map(len, of_each))
        for batches in of_each:
            batches += [[unlabelled(by_length[-1])] for _ in range(count - len(batches))]
        return [list(each) for each in zip(*of_each, strict=True)]

    def _cut(self, pairs: list[EncodedPair]) -> list[list[EncodedPair]]:
        """Micro-batches of one process, of pairs that begin with the longest."""
        if self.kind == "padded":
            return [pairs[start : start + self.pairs] for start in range(0, len(pairs), self.pairs)]
        return first_fit(pairs, self.length, self.tokens)


def first_fit(
    pairs: Sequence[EncodedPair], length: Callable[[EncodedPair], int], room: float
) -> list[list[EncodedPair]]:
    """Put every pair into the first bin that has room for it; one that fits nowhere is alone."""
    bins: list[list[EncodedPair]] = []
    left: list[float] = []
    for pair in pairs:
        size = length(pair)
        place = next((k for k, free in enumerate(left) if free >= size), len(bins))
        if place == len(bins):
            bins.append([])
            left.append(room)
        bins[place].append(pair)
        left[place] -= size
    return bins
