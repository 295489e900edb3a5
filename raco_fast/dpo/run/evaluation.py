"""Held-out preference accuracy, margin and loss per objective."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn
from tqdm import tqdm

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import labelled_counts
from raco_fast.dpo.data.collation import PairBatch
from raco_fast.dpo.data.layout import Layout, Round
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.metrics import PreferenceMetrics
from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.scoring import ReferenceLogps, pair_logps, score_pairs
from raco_fast.dpo.sharded import free_gathered

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """A held-out set and how it is scored.

    Args:
        pairs: encoded.
        rounds: the micro-batches that they are scored in, those of their reference.
        layout: how a micro-batch lies in memory.
        references: tail weight -> their reference log-probabilities.
        losses: objective name -> its loss; reported as means over all labelled pairs.
        chunk_tokens: as in `sequence_logps`.
        processes: those that the pairs are dealt to; each has to evaluate.
        rewards: as in `score_pairs`.
    """

    pairs: Sequence[EncodedPair]
    rounds: Sequence[Round]
    layout: Layout
    references: Mapping[float, ReferenceLogps]
    losses: Mapping[str, PreferenceLoss]
    chunk_tokens: int
    processes: Processes = field(default_factory=Processes)
    rewards: Mapping[str, ReferenceLogps] = field(default_factory=dict)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Preference metrics and losses of `model` without dropout, each name after `eval_`.

        Args:
            stopped: asked before every batch on every process; where one says so, the evaluation
                ends there, on all of them, and gives None.
        """

        def score(batch: PairBatch) -> Tensor:
            return pair_logps(model, batch, self.chunk_tokens, self.references)

        with evaluating(model):
            result = self._evaluate(score, stopped)
            free_gathered(model)
        return result

    def evaluate_reference(self) -> dict[str, float]:
        """The same metrics for the reference model itself, without running it again.

        Before the first step the policy is the reference, so this is the evaluation at step 0.
        """

        def score(batch: PairBatch) -> Tensor:
            cpu = torch.device("cpu")
            return torch.cat([t for r in self.references.values() for t in r.of(batch.ids, cpu)])

        result = self._evaluate(score, lambda: False)
        assert result is not None
        return result

    def _evaluate(
        self, score: Callable[[PairBatch], Tensor], stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        counts = labelled_counts(self.pairs, tuple(self.losses))
        metrics = PreferenceMetrics(self.losses)
        losses = {name: torch.zeros(()) for name in self.losses}
        rank = self.processes.rank
        for groups in tqdm(self.rounds, desc="evaluate", leave=False, disable=rank > 0):
            (stop,) = self.processes.agree(lambda: [stopped()], 1)
            if stop:
                return None
            batch = self.layout.batch(groups[rank])
            of_run = (self.references, self.losses, self.rewards)
            scores = score_pairs(score(batch), batch, *of_run)
            parts = preference_losses(
                scores,
                batch.labels,
                loss=self.losses,
                counts=counts,
                pair_weights=batch.pair_weights,
            )
            losses = {name: parts[name] + losses[name] for name in losses}
            metrics.add(scores, batch.labels)
        result = metrics.result(self.processes)
        own = torch.tensor([float(loss) for loss in losses.values()], dtype=torch.float64)
        totals = zip(losses, self.processes.sum(own).tolist(), strict=True)
        result |= {f"loss/{name}": total for name, total in totals if counts[name]}
        wrong = [n for n in self.losses if not isfinite(result.get(f"rewards/margins/{n}", 0.0))]
        if wrong:
            logger.warning(
                "held-out pairs of %s have scores that are not finite, so their accuracies, "
                "margins and losses are NaN (null in metrics.jsonl)",
                ", ".join(map(repr, wrong)),
            )
        return {f"eval_{name}": value for name, value in result.items()}
