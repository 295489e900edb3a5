"""One optimizer step on preference pairs: batches, scores, losses, m gradients, one update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import labelled_counts, token_count
from raco_fast.dpo.data.collation import PairBatch
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.metrics import PreferenceMetrics, solution_metrics
from raco_fast.dpo.run.moving_reference import MovingReference
from raco_fast.dpo.scoring import (
    KnownReferences,
    ReferenceLogps,
    pair_logps,
    score_pairs,
    scores_of_loss,
)
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.solver.solution import DualSolution


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        losses: objective -> mean loss over the step's labelled pairs, before the update; of
            several processes, what this one's pairs add to it, times their number. An objective
            without a labelled pair in the step has none.
        objectives: all of them, in the order of `solution`.
        preference: statistics of the scores of this process's pairs, before the update.
        solution: how the gradients were combined; not `finite` where the step was skipped, None
            where nothing was labelled, so that there was no step to take.
        skipped_steps: steps skipped so far.
        tokens: tokens processed by all processes, padding not counted.
        processes: that have taken the step.
    """

    losses: dict[str, Tensor]
    objectives: tuple[str, ...]
    preference: PreferenceMetrics
    solution: DualSolution | None
    skipped_steps: int
    tokens: int
    processes: Processes

    @property
    def skipped(self) -> bool:
        """Whether a loss or gradient was not finite, so that nothing was updated."""
        return self.solution is not None and not self.solution.finite

    def mean_losses(self) -> dict[str, float]:
        """Objective -> mean loss; waits for the GPU and all processes."""
        own = torch.tensor([float(loss) for loss in self.losses.values()], dtype=torch.float64)
        means = (self.processes.sum(own) / self.processes.size).tolist()
        return dict(zip(self.losses, means, strict=True))

    def not_finite(self) -> list[str]:
        """The objectives whose loss is not finite, or else whose gradient; waits as `mean_losses`.

        In one backward pass a loss that is not finite takes the other objectives' gradients along.
        """
        of_losses = [n for n, loss in self.mean_losses().items() if not isfinite(loss)]
        if of_losses or self.solution is None:
            return of_losses
        squares = zip(self.objectives, self.solution.gram.diagonal(), strict=True)
        return [name for name, square in squares if not isfinite(square)]

    def metrics(self) -> dict[str, float]:
        """Everything under the names of docs/metrics.md; waits for the GPU and all processes."""
        combined = self.solution and solution_metrics(self.solution, self.objectives)
        return {
            **{f"loss/{name}": loss for name, loss in self.mean_losses().items()},
            **self.preference.result(self.processes),
            **(combined or {}),
            "raco/skipped_steps": float(self.skipped_steps),
        }


@dataclass(frozen=True)
class PreferenceStep:
    """A function pairs -> `StepResult` that takes one step of the optimizer.

    Args:
        model: the policy.
        optimizer: of its parameters; its weights name the objectives.
        references: log-probabilities under the reference of every pair that is to come, for each
            of `tail_weights(losses)`; or a reference that scores a step's pairs itself.
        losses: objective name -> loss.
        layout: of the micro-batches, what a process holds in memory at once.
        chunk_tokens: as in `sequence_logps`.
        mode: as in `ClippedCAGradAdamW.backward`.
        processes: those that the step's pairs are dealt to; each is called with all of them.
        rewards: as in `score_pairs`.
    """

    model: nn.Module
    optimizer: ClippedCAGradAdamW
    references: KnownReferences | MovingReference
    losses: Mapping[str, PreferenceLoss]
    layout: Layout
    chunk_tokens: int = 256
    mode: str = "one_backward"
    processes: Processes = field(default_factory=Processes)
    rewards: Mapping[str, ReferenceLogps] = field(default_factory=dict)

    def batches(self, pairs: Sequence[EncodedPair]) -> list[PairBatch]:
        """The micro-batches of this process, of a step's pairs."""
        rounds = self.layout.rounds(pairs, self.processes.size)
        return [self.layout.batch(groups[self.processes.rank]) for groups in rounds]

    def __call__(
        self, pairs: Sequence[EncodedPair], batches: Sequence[PairBatch] | None = None
    ) -> StepResult:
        """Losses are means over the labelled pairs of the whole step, however it is cut.

        `batches`: what the method of that name gives, where it is known already.

        Where no pair is labelled there is nothing to learn, and nothing is touched: a step along
        zeros would still move the weights, by their decay and by AdamW's averages.
        """
        objectives = tuple(self.optimizer.weights)
        counts = labelled_counts(pairs, objectives)
        if not any(counts.values()):
            untaken = PreferenceMetrics(self.losses), None, self.optimizer.skipped_steps, 0
            return StepResult({}, objectives, *untaken, self.processes)
        size = self.processes.size
        # The optimizer takes the mean over the processes, which is then the mean over the step.
        divisors = {name: count / size for name, count in counts.items()}
        preference = PreferenceMetrics(self.losses)
        totals = {name: torch.zeros(()) for name in counts}
        batches = self.batches(pairs) if batches is None else batches
        for batch, references in zip(batches, self._references(batches), strict=True):
            logps = pair_logps(self.model, batch, self.chunk_tokens, references)
            scores = score_pairs(logps, batch, references, self.losses, self.rewards)
            losses = preference_losses(
                scores,
                batch.labels,
                loss=self.losses,
                counts=divisors,
                pair_weights=batch.pair_weights,
            )
            backward_of_pairs(
                self.optimizer.backward,
                losses,
                logps,
                batch.labels,
                self.losses,
                references,
                self.mode,
            )
            preference.add(scores, batch.labels)
            totals = {name: losses[name].detach() + totals[name] for name in totals}
        self.optimizer.step()
        self.optimizer.zero_grad()
        solution, skipped = self.optimizer.solution, self.optimizer.skipped_steps
        assert solution is not None
        taken = {name: totals[name] for name, count in counts.items() if count}
        of_step = preference, solution, skipped, token_count(pairs)
        return StepResult(taken, objectives, *of_step, self.processes)

    def _references(self, batches: Sequence[PairBatch]) -> Sequence[KnownReferences]:
        """Of each micro-batch."""
        if isinstance(self.references, MovingReference):
            return self.references.logps(batches)
        return [self.references] * len(batches)


def backward_of_pairs(
    backward: Callable[..., None],
    losses: Mapping[str, Tensor],
    logps: Tensor,
    labels: Mapping[str, Tensor],
    of_objectives: Mapping[str, PreferenceLoss],
    tails: Iterable[float],
    mode: str,
) -> None:
    """Every objective's gradient of a micro-batch; each pair is a sample.

    A loss that is not finite makes its gradient so too, which skips the step: clamped losses
    (hinge) can be NaN with a finite gradient.

    Args:
        backward: as `ObjectiveGradients.backward`.
        losses, labels: of the objectives.
        logps: what `pair_logps` gave with these `tails`.
        of_objectives: objective name -> its loss.
        mode: of `backward`.
    """
    honest = {name: loss * (1 + 0 * loss.detach()) for name, loss in losses.items()}
    if not any(loss.requires_grad for loss in honest.values()):
        # A micro-batch of ties only: gradients of zero, where constants alone would be refused.
        honest = {name: loss + 0.0 * logps.sum() for name, loss in honest.items()}
    tails = list(tails)
    labelled = {
        name: scores_of_loss(label != 0, of_objectives[name], tails)
        for name, label in labels.items()
    }
    pairs = len(next(iter(labels.values())))
    samples = torch.arange(pairs).repeat(len(logps) // pairs)
    backward(honest, scores=logps, mode=mode, samples=samples, labelled=labelled)
