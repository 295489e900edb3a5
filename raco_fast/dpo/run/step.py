"""One optimizer step on preference pairs: batches, scores, losses, m gradients, one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raco_fast.dpo.data.batches import labelled_counts, micro_batches
from raco_fast.dpo.data.tokenization import EncodedPair, collate
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.metrics import PreferenceMetrics, solution_metrics
from raco_fast.dpo.scoring import ReferenceLogps, pair_logps, score_pairs
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.solver.solution import DualSolution


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        losses: objective -> mean loss over the step's labelled pairs, before the update.
        preference: statistics of the scores, before the update.
        solution: how the gradients were combined; not `finite` where the step was skipped.
        skipped_steps: steps skipped so far.
        tokens: tokens processed, padding not counted.
    """

    losses: dict[str, Tensor]
    preference: PreferenceMetrics
    solution: DualSolution
    skipped_steps: int
    tokens: int

    def metrics(self) -> dict[str, float]:
        """Everything under the names of docs/metrics.md; waits for the GPU."""
        return {
            **{f"loss/{name}": float(loss) for name, loss in self.losses.items()},
            **self.preference.result(),
            **solution_metrics(self.solution, tuple(self.losses)),
            "raco/skipped_steps": float(self.skipped_steps),
        }


@dataclass(frozen=True)
class PreferenceStep:
    """A function pairs -> `StepResult` that takes one step of the optimizer.

    Args:
        model: the policy.
        optimizer: of its parameters; its weights name the objectives.
        references: log-probabilities under the reference of every pair that is to come, for each
            of `tail_weights(losses)`.
        losses: objective name -> loss.
        pad_id: padding token.
        pairs_per_micro_batch: pairs held in memory at once.
        chunk_tokens: as in `sequence_logps`.
        mode: as in `ClippedCAGradAdamW.backward`.
    """

    model: nn.Module
    optimizer: ClippedCAGradAdamW
    references: Mapping[float, ReferenceLogps]
    losses: Mapping[str, PreferenceLoss]
    pad_id: int
    pairs_per_micro_batch: int
    chunk_tokens: int = 256
    mode: str = "one_backward"

    def __call__(self, pairs: Sequence[EncodedPair]) -> StepResult:
        """Losses are means over the labelled pairs of the whole step, however it is cut."""
        counts = labelled_counts(pairs, tuple(self.optimizer.weights))
        preference = PreferenceMetrics(self.losses)
        totals = {name: torch.zeros(()) for name in counts}
        tokens = 0
        for group in micro_batches(pairs, self.pairs_per_micro_batch):
            batch = collate(group, self.pad_id)
            logps = pair_logps(self.model, batch, self.chunk_tokens, self.references)
            scores = score_pairs(logps, batch, self.references, self.losses)
            losses = preference_losses(
                scores,
                batch.labels,
                loss=self.losses,
                counts=counts,
                pair_weights=batch.pair_weights,
            )
            self._backward(losses, logps)
            preference.add(scores, batch.labels)
            totals = {name: losses[name].detach() + totals[name] for name in totals}
            tokens += int(batch.attention_mask.sum())
        self.optimizer.step()
        self.optimizer.zero_grad()
        solution, skipped = self.optimizer.solution, self.optimizer.skipped_steps
        assert solution is not None
        return StepResult(totals, preference, solution, skipped, tokens)

    def _backward(self, losses: dict[str, Tensor], logps: Tensor) -> None:
        """Every objective's gradient.

        A loss that is not finite makes its gradient so too, which skips the step: clamped losses
        (hinge) can be NaN with a finite gradient.
        """
        honest = {name: loss * (1 + 0 * loss.detach()) for name, loss in losses.items()}
        if not any(loss.requires_grad for loss in honest.values()):
            # A micro-batch of ties only: gradients of zero, where constants alone would be refused.
            honest = {name: loss + 0.0 * logps.sum() for name, loss in honest.items()}
        self.optimizer.backward(honest, scores=logps, mode=self.mode)
