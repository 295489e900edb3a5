"""What a run's pairs are, before anything is trained on them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raco_fast.dpo.data.batches import pair_length
from raco_fast.dpo.data.label_counts import Labels, labels_of
from raco_fast.dpo.data.tokenization import EncodedPair

SHARES = (0.5, 0.9, 0.99, 1.0)
"""Of the pairs, those whose lengths are told: so many are at most as long."""


@dataclass(frozen=True)
class DataCheck:
    """Counts over the training pairs, and those held out.

    Attributes:
        pairs, held_out: how many.
        preferred: objective -> pairs in which (a, b) is preferred.
        soft: objective -> labels that are neither 1 nor -1.
        labels: how often two objectives' labels meet, and agree.
        lengths: what -> tokens at each of `SHARES`, of prompts, responses and pairs (a prompt and
            its longer response).
        once: tokens of a pass over the pairs with every prompt once a pair.
        twice: with every prompt once a response.
        duplicates: pairs that are there before, in this order of responses or the other.
        contradictions: objective -> duplicates whose label is the opposite of that before.
        shared_prompts: pairs whose prompt an earlier pair has.
        leaked: held-out pairs that are training pairs.
        leaked_prompts: held-out pairs whose prompt a training pair has.
    """

    pairs: int
    held_out: int
    preferred: dict[str, tuple[int, int]]
    soft: dict[str, int]
    labels: Labels
    lengths: dict[str, list[int]]
    once: int
    twice: int
    duplicates: int
    contradictions: dict[str, int]
    shared_prompts: int
    leaked: int
    leaked_prompts: int


def examine(
    training: Sequence[EncodedPair], held_out: Sequence[EncodedPair], objectives: Sequence[str]
) -> DataCheck:
    """Count; takes 100 bytes a pair."""
    seen = _Seen(objectives)
    for pair in training:
        seen.add(pair)
    preferred, soft = {}, {}
    for name in objectives:
        values = np.array([pair.labels[name] for pair in training])
        preferred[name] = (int((values > 0.5).sum()), int((values < -0.5).sum()))
        soft[name] = int(((values != 0) & (abs(values) != 1)).sum())
    prompts = np.array([len(pair.prompt_ids) for pair in training])
    answers = np.array([(len(pair.a_ids), len(pair.b_ids)) for pair in training])
    longest = np.array([pair_length(pair) for pair in training])
    return DataCheck(
        pairs=len(training),
        held_out=len(held_out),
        preferred=preferred,
        soft=soft,
        labels=labels_of(training, objectives),
        lengths={
            "prompt": _at_shares(prompts),
            "response": _at_shares(answers.ravel()),
            "pair": _at_shares(longest),
        },
        once=int(prompts.sum() + answers.sum()),
        twice=int(2 * prompts.sum() + answers.sum()),
        duplicates=seen.duplicates,
        contradictions=seen.contradictions,
        shared_prompts=len(training) - len(seen.prompts),
        leaked=sum(_key(pair)[0] in seen.labels for pair in held_out),
        leaked_prompts=sum(_digest([pair.prompt_ids]) in seen.prompts for pair in held_out),
    )


class _Seen:
    """The pairs that have been there, by digests of their tokens."""

    def __init__(self, objectives: Sequence[str]) -> None:
        self.labels: dict[bytes, tuple[float, ...]] = {}
        self.prompts: set[bytes] = set()
        self.duplicates = 0
        self.contradictions = dict.fromkeys(objectives, 0)

    def add(self, pair: EncodedPair) -> None:
        """Note a pair, and how it contradicts the one that was there before."""
        key, sign = _key(pair)
        labels = tuple(sign * pair.labels[name] for name in self.contradictions)
        self.prompts.add(_digest([pair.prompt_ids]))
        before = self.labels.setdefault(key, labels)
        if before is labels:
            return
        self.duplicates += 1
        for name, one, other in zip(self.contradictions, before, labels, strict=True):
            self.contradictions[name] += one * other < 0


def _key(pair: EncodedPair) -> tuple[bytes, int]:
    """The pair whichever response is first, and the sign that its labels have then."""
    first, second = sorted((pair.a_ids, pair.b_ids))
    return _digest([pair.prompt_ids, first, second]), 1 if first is pair.a_ids else -1


def _digest(parts: Iterable[Sequence[int]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(array("q", part).tobytes())
    return digest.digest()


def _at_shares(lengths: np.ndarray) -> list[int]:
    return [int(np.quantile(lengths, share, method="inverted_cdf")) for share in SHARES]
