"""What a run's policy is compared with: the reference's log-probabilities of all its pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import BatchSchedule
from raco_fast.dpo.data.layout import Layout, Round
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.evaluation import HeldOut
from raco_fast.dpo.run.failures import memory_named, to_run_a_model
from raco_fast.dpo.run.inputs import RunInputs
from raco_fast.dpo.run.moving_reference import MovingReference
from raco_fast.dpo.run.reference_cache import reference_logps
from raco_fast.dpo.scoring import ReferenceLogps, pair_logps, tail_weights
from raco_fast.dpo.sharded import free_gathered


class References:
    """Scores pairs under the reference of a run, in given micro-batches.

    Args:
        config, inputs: of the run.
        layout: of its micro-batches.
        processes: that share them.
    """

    def __init__(
        self, config: TrainConfig, inputs: RunInputs, layout: Layout, processes: Processes
    ) -> None:
        self._config, self._inputs, self.layout = config, inputs, layout
        self._processes = processes

    def of_training(
        self, batches: BatchSchedule, *, any_rounds: bool
    ) -> dict[float, ReferenceLogps] | MovingReference:
        """Tail weight -> scores of the training pairs, in the micro-batches of the first epoch.

        A reference that moves scores them in their steps instead.

        Args:
            batches: which pairs are in a step.
            any_rounds: whether a cache of other micro-batches will do, as for a run that goes on.
        """
        config, pairs = self._config, self._inputs.training
        if config.reference is not None:
            tails = tail_weights(config.objective_losses)
            return MovingReference(
                self._inputs.policy, config.reference, tails, config.chunk_tokens
            )
        rounds = [
            each
            for step in range(batches.steps_per_epoch)
            for each in self.rounds_of([pairs[i] for i in batches.indices(step)])
        ]
        return self._scored(pairs, rounds, self.layout, any_rounds)

    def rounds_of(self, pairs: Sequence[EncodedPair]) -> list[Round]:
        """The micro-batches of a step's pairs."""
        return self.layout.rounds(pairs, self._processes.size)

    @torch.no_grad()
    def margin_noise(
        self, pairs: Sequence[EncodedPair], known: Mapping[float, ReferenceLogps]
    ) -> float:
        """How far the reference's margins move where pairs lie in a later step's micro-batches.

        Args:
            pairs: of that step, of which one micro-batch is scored.
            known: what `of_training` gave.
        Returns:
            Root mean square in nats, over all processes.
        """
        processes, model = self._processes, self._inputs.model
        group = self.rounds_of(pairs)[0][processes.rank]
        batch = self.layout.batch(group)
        with evaluating(model), self._inputs.policy.as_reference(model):
            again = pair_logps(model, batch, self._config.chunk_tokens, known).cpu()
            free_gathered(model)
        each = [logps for one in known.values() for logps in one.of(batch.ids, again.device)]
        a, b = (again - torch.cat(each)).view(len(known), 2, -1).unbind(1)
        sums = torch.stack([(a - b).square().sum(), torch.tensor(float(a.numel()))])
        total, count = processes.sum(sums.double()).tolist()
        return math.sqrt(total / count)

    def held_out(self, rewards: Mapping[str, ReferenceLogps] | None = None) -> HeldOut:
        """The held-out pairs with their scores; without a graph twice as many fit at once.

        Their reference is that of the beginning, also where that of the training moves: one measure
        for all evaluations of a run.

        Args:
            rewards: as in `score_pairs`.
        """
        pairs, layout = self._inputs.held_out, self.layout.scaled(2)
        rounds = layout.rounds(pairs, self._processes.size)
        return HeldOut(
            pairs,
            rounds,
            layout,
            self._scored(pairs, rounds, layout, any_rounds=False),
            self._config.objective_losses,
            chunk_tokens=self._config.chunk_tokens,
            processes=self._processes,
            rewards=rewards or {},
        )

    def _scored(
        self, pairs: list[EncodedPair], rounds: list[Round], layout: Layout, any_rounds: bool
    ) -> dict[float, ReferenceLogps]:
        config, policy = self._config, self._inputs.policy
        with memory_named("the reference's pass over the data", to_run_a_model(config)):
            return reference_logps(
                self._inputs.model,
                pairs,
                rounds,
                layout,
                model_hash=policy.reference_hash,
                cache_dir=config.cache_folder,
                chunk_tokens=config.chunk_tokens,
                tails=tail_weights(config.objective_losses),
                as_reference=policy.as_reference,
                any_rounds=any_rounds,
            )
