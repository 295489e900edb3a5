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
