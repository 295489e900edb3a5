"""Pair scores: the policy's log-probabilities of a batch beside the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raco_fast.dpo.data.tokenization import PairBatch
from raco_fast.dpo.logps import sequence_logps
from raco_fast.dpo.losses.pair_scores import PairScores


@dataclass(frozen=True)
class ReferenceLogps:
    """Reference log-probabilities by pair id: (response a, response b)."""

    by_id: dict[str, tuple[float, float]]

    def of(self, ids: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Two float32 [B] tensors, for responses a and b of the pairs `ids`."""
        values = torch.tensor([self.by_id[id] for id in ids], dtype=torch.float32).to(device)
        return values[:, 0], values[:, 1]


def pair_logps(model: nn.Module, batch: PairBatch, chunk_tokens: int) -> Tensor:
    """Summed log-probabilities, float32 [2B]: responses a, then b, of a batch on the CPU."""
    moved = batch.to(next(model.parameters()).device)
    return sequence_logps(
        model, moved.input_ids, moved.attention_mask, batch.completion_mask, chunk_tokens
    )


def score_pairs(logps: Tensor, batch: PairBatch, reference: ReferenceLogps) -> PairScores:
    """Scores of a batch on the CPU under the policy and the reference.

    Args:
        logps: `pair_logps` of the policy. The scores are on its device; the batch's masks and
            labels only select, so they stay on the CPU, and nothing waits for the GPU.
    """
    logps_a, logps_b = logps.chunk(2)
    device = logps_a.device
    ref_a, ref_b = reference.of(batch.ids, device)
    tokens_a, tokens_b = batch.tokens_a.to(device), batch.tokens_b.to(device)
    return PairScores(logps_a, logps_b, ref_a, ref_b, tokens_a, tokens_b)


def adapter_off(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a PEFT model computes what its base model does."""
    disable = getattr(model, "disable_adapter", None)
    return nullcontext() if disable is None else disable()
