"""Which pairs a step sees: computed from its number, so a resumed run replays nothing."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from raco_fast.dpo.data.tokenization import EncodedPair


class BatchSchedule:
    """Shuffled epochs over `n_pairs` pairs, cut into steps of `pairs_per_step`.

    Every pair is seen once an epoch; an epoch's last step may be smaller. Epoch e is shuffled with
    seed + e.
    """

    def __init__(self, n_pairs: int, pairs_per_step: int, seed: int) -> None:
        self.n_pairs, self.pairs_per_step, self.seed = n_pairs, pairs_per_step, seed
        self.steps_per_epoch = math.ceil(n_pairs / pairs_per_step)

    def epoch(self, step: int) -> float:
        """Passes over the data completed before `step` (counted from 0)."""
        return step / self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Indices of the pairs of `step` (counted from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.n_pairs, generator=generator)
        start = place * self.pairs_per_step
        indices: list[int] = order[start : start + self.pairs_per_step].tolist()
        return indices


def micro_batches(
    pairs: Sequence[EncodedPair], size: int, rank: int = 0, processes: int = 1
) -> list[list[EncodedPair]]:
    """Cut a step into micro-batches of like length, longest first, for one of several processes.

    Like length saves padding; with the longest first, what does not fit in memory fails at once.
    The pairs are dealt one by one in this order, there and back (0, 1, 1, 0, 0, ...): processes
    carry as many pairs, but for one, and their sums of lengths differ by at most the longest's.

    All processes have the same number of micro-batches, since sharded parameters are gathered in
    every forward pass. One that would have an empty one runs the shortest pair without labels.

    Args:
        pairs: of the whole step; at least one.
        size: pairs in a micro-batch of a process, at most.
    """
    by_length = sorted(pairs, key=lambda pair: (-pair_length(pair), pair.id))
    rounds = [by_length[start : start + processes] for start in range(0, len(pairs), processes)]
    own = []
    for k, dealt in enumerate(rounds):
        place = processes - 1 - rank if k % 2 else rank
        own += dealt[place : place + 1]
    batches = [own[start : start + size] for start in range(0, len(own), size)]
    if len(batches) < math.ceil(len(rounds) / size):
        batches.append([unlabelled(by_length[-1])])
    return batches


def unlabelled(pair: EncodedPair) -> EncodedPair:
    """The pair with a label for nobody: it adds zero to every loss and gradient."""
    return replace(pair, labels=dict.fromkeys(pair.labels, 0), pair_weights={})


def pair_length(pair: EncodedPair) -> int:
    """Tokens of the longer of a pair's two sequences."""
    return len(pair.prompt_ids) + max(len(pair.a_ids), len(pair.b_ids))


def token_count(pairs: Sequence[EncodedPair]) -> int:
    """Tokens of both sequences of every pair."""
    return sum(2 * len(p.prompt_ids) + len(p.a_ids) + len(p.b_ids) for p in pairs)


def labelled_counts(pairs: Sequence[EncodedPair], objectives: Sequence[str]) -> dict[str, int]:
    """Objective name -> pairs labelled for it."""
    return {name: sum(pair.labels[name] != 0 for pair in pairs) for name in objectives}
