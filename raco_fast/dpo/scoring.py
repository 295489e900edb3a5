"""Pair scores: the policy's log-probabilities of a batch beside the reference's."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from raco_fast.backends.transfer import sent
from raco_fast.dpo.data.collation import PaddedRows, PairBatch
from raco_fast.dpo.logps import sequence_logps
from raco_fast.dpo.losses.pair_scores import PairScores
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.packed import packed_logps
from raco_fast.dpo.sharded import device_of


@dataclass(frozen=True)
class ReferenceLogps:
    """Reference log-probabilities by pair id: (response a, response b)."""

    by_id: dict[str, tuple[float, float]]

    def of(self, ids: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Two float32 [B] tensors, for responses a and b of the pairs `ids`."""
        values = torch.tensor([self.by_id[id] for id in ids], dtype=torch.float32)
        values = sent(values, device)
        return values[:, 0], values[:, 1]


@dataclass(frozen=True)
class BatchLogps:
    """Reference log-probabilities of one batch, float32 [B] each: responses a, and b."""

    a: Tensor
    b: Tensor

    def of(self, ids: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Both, of the batch whose pairs are `ids`."""
        assert len(ids) == len(self.a)
        return self.a.to(device), self.b.to(device)


KnownReferences: TypeAlias = Mapping[float, ReferenceLogps | BatchLogps]
"""Tail weight -> the reference's log-probabilities of the pairs of a batch, or of more."""


def tail_weights(losses: Mapping[str, PreferenceLoss]) -> tuple[float, ...]:
    """The different `tail_weight`s of the losses: what a response has to be scored with."""
    return tuple(dict.fromkeys(loss.tail_weight for loss in losses.values()))


def pair_logps(
    model: nn.Module, batch: PairBatch, chunk_tokens: int, tails: Iterable[float] = (1.0,)
) -> Tensor:
    """Summed log-probabilities of a batch on the CPU.

    With k tail weights every sequence is run k times, as k sequences: from a sequence with two
    scores, one backward pass could not tell the gradients of the two apart.

    Args:
        tails: see `PreferenceLoss.tail_weight`.
    Returns:
        float32 [k * 2B]: for each tail weight, responses a, then b.
    """
    tails, rows = list(tails), batch.rows
    if isinstance(rows, PaddedRows):
        return _padded_logps(model, rows, batch, chunk_tokens, tails)
    weights = None
    if tails != [1.0]:
        weights = torch.cat([torch.where(rows.past, tail, 1.0) for tail in tails])
    return packed_logps(model, rows.repeated(len(tails)), chunk_tokens, weights)


def _padded_logps(
    model: nn.Module, rows: PaddedRows, batch: PairBatch, chunk_tokens: int, tails: list[float]
) -> Tensor:
    device, copies = device_of(model), (len(tails), 1)
    shorter = torch.minimum(batch.tokens_a, batch.tokens_b).repeat(2)
    masks = [_token_weights(rows.completion_mask, shorter, tail) for tail in tails]
    return sequence_logps(
        model,
        sent(rows.input_ids, device).repeat(copies),
        sent(rows.attention_mask, device).repeat(copies),
        masks[0] if len(masks) == 1 else torch.cat([mask.float() for mask in masks]),
        chunk_tokens,
    )


def _token_weights(mask: Tensor, shorter: Tensor, tail: float) -> Tensor:
    """The completion mask [2B, T], `tail` past the end of the pair's shorter response."""
    if tail == 1.0:
        return mask
    past = mask.cumsum(1) > shorter[:, None]
    return torch.where(past, tail, 1.0) * mask


def score_pairs(
    logps: Tensor,
    batch: PairBatch,
    references: KnownReferences,
    losses: Mapping[str, PreferenceLoss],
    rewards: Mapping[str, ReferenceLogps] | None = None,
) -> dict[str, PairScores]:
    """Objective -> the scores of a batch on the CPU that its loss is a function of.

    Args:
        logps: `pair_logps` of the policy with the tail weights of `references`, in their order.
            The scores are on its device.
        references: tail weight -> the reference's log-probabilities.
        losses: of the objectives.
        rewards: objective -> `PairScores.other_a` and `other_b` by pair id, where it has any.
    """
    device, by_tail = logps.device, {}
    tokens_a, tokens_b = sent(batch.tokens_a, device), sent(batch.tokens_b, device)
    for (tail, reference), both in zip(
        references.items(), logps.chunk(len(references)), strict=True
    ):
        a, b = both.chunk(2)
        ref_a, ref_b = reference.of(batch.ids, device)
        by_tail[tail] = PairScores(a, b, ref_a, ref_b, tokens_a, tokens_b)
    found = {name: by_tail[loss.tail_weight] for name, loss in losses.items()}
    for name, known in (rewards or {}).items():
        other_a, other_b = known.of(batch.ids, device)
        found[name] = replace(found[name], other_a=other_a, other_b=other_b)
    return found


def scores_of_loss(pairs: Tensor, loss: PreferenceLoss, tails: Iterable[float]) -> Tensor:
    """Which of `pair_logps`'s scores a loss sees, given which of the B pairs: bool [k * 2B]."""
    seen = [pairs if tail == loss.tail_weight else torch.zeros_like(pairs) for tail in tails]
    return torch.cat([of_pairs for of_tail in seen for of_pairs in (of_tail, of_tail)])


def adapter_off(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a PEFT model computes what its base model does."""
    disable = getattr(model, "disable_adapter", None)
    return nullcontext() if disable is None else disable()
