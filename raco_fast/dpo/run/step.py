"""One optimizer step on preference pairs: batches, scores, losses, m gradients, one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import labelled_counts, micro_batches, token_count
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
        losses: objective -> mean loss over the step's labelled pairs, before the update; of
            several processes, what this one's pairs add to it, times their number.
        preference: statistics of the scores of this process's pairs, before the update.
        solution: how the gradients were combined; not `finite` where the step was skipped.
        skipped_steps: steps skipped so far.
        tokens: tokens processed by all processes, padding not counted.
        processes: that have taken the step.
    """

    losses: dict[str, Tensor]
    preference: PreferenceMetrics
    solution: DualSolution
    skipped_steps: int
    tokens: int
    processes: Processes

    def metrics(self) -> dict[str, float]:
        """Everything under the names of docs/metrics.md; waits for the GPU and all processes."""
        own = torch.tensor([float(loss) for loss in self.losses.values()], dtype=torch.float64)
        means = (self.processes.sum(own) / self.processes.size).tolist()
        return {
            **{f"loss/{name}": loss for name, loss in zip(self.losses, means, strict=True)},
            **self.preference.result(self.processes),
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
        pairs_per_micro_batch: pairs that a process holds in memory at once.
        chunk_tokens: as in `sequence_logps`.
        mode: as in `ClippedCAGradAdamW.backward`.
        processes: those that the step's pairs are dealt to; each is called with all of them.
    """

    model: nn.Module
    optimizer: ClippedCAGradAdamW
    references: Mapping[float, ReferenceLogps]
    losses: Mapping[str, PreferenceLoss]
    pad_id: int
    pairs_per_micro_batch: int
    chunk_tokens: int = 256
    mode: str = "one_backward"
    processes: Processes = field(default_factory=Processes)

    def __call__(self, pairs: Sequence[EncodedPair]) -> StepResult:
        """Losses are means over the labelled pairs of the whole step, however it is cut."""
        rank, size = self.processes.rank, self.processes.size
        counts = labelled_counts(pairs, tuple(self.optimizer.weights))
        # The optimizer takes the mean over the processes, which is then the mean over the step.
        divisors = {name: count / size for name, count in counts.items()}
        preference = PreferenceMetrics(self.losses)
        totals = {name: torch.zeros(()) for name in counts}
        for group in micro_batches(pairs, self.pairs_per_micro_batch, rank, size):
            batch = collate(group, self.pad_id)
            logps = pair_logps(self.model, batch, self.chunk_tokens, self.references)
            scores = score_pairs(logps, batch, self.references, self.losses)
            losses = preference_losses(
                scores,
                batch.labels,
                loss=self.losses,
                counts=divisors,
                pair_weights=batch.pair_weights,
            )
            self._backward(losses, logps)
            preference.add(scores, batch.labels)
            totals = {name: losses[name].detach() + totals[name] for name in totals}
        self.optimizer.step()
        self.optimizer.zero_grad()
        solution, skipped = self.optimizer.solution, self.optimizer.skipped_steps
        assert solution is not None
        tokens = token_count(pairs)
        return StepResult(totals, preference, solution, skipped, tokens, self.processes)

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
