"""`raco-fast verify`: every gradient mode against autograd, on the model and data of a run."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.models import trainable
from raco_fast.dpo.modes import begin_training
from raco_fast.dpo.run.batching import layout_of
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.inputs import load_inputs
from raco_fast.dpo.run.margin_rewards import margin_rewards
from raco_fast.dpo.run.reference_cache import compute_reference
from raco_fast.dpo.run.weight_dtype import with_dtype
from raco_fast.dpo.scoring import pair_logps, score_pairs, tail_weights
from raco_fast.verification import Verification, verify


def verify_run(config: TrainConfig) -> Verification:
    """Compare all gradient modes on one micro-batch of a run; nothing is trained or written.

    Trained parameters that begin as zeros (an adapter's) are given small random values: behind
    zeros, gradients are zero whatever the mode.

    Raises:
        ValueError: bad configuration, data or model path; or one backward pass is not exact for
            the model, for a reason that the message gives.
    """
    config = with_dtype(config, Processes(), keep=False)
    inputs, losses = load_inputs(config), config.objective_losses
    inputs.check_causal()
    model = inputs.model
    layout = layout_of(config, inputs, Processes()).with_tokens(math.inf)
    pairs = _labelled_for_all(inputs.training, config.objectives, config.pairs_per_micro_batch)
    batch = layout.batch(pairs)
    references = compute_reference(
        model,
        pairs,
        layout,
        config.chunk_tokens,
        tail_weights(losses),
        inputs.policy.as_reference,
    )

    found = margin_rewards(config, inputs, Processes(), pairs, cached=False)
    (rewards,) = found.of_sets

    def run(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        logps = pair_logps(model, batch, config.chunk_tokens, references)
        found = preference_losses(
            score_pairs(logps, batch, references, losses, rewards),
            batch.labels,
            loss=losses,
            pair_weights=batch.pair_weights,
        )
        return found, logps

    for p in trainable(model).values():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    begin_training(model, noise=config.model.dropout)
    return verify(model, run, quiet=True)


def _labelled_for_all(
    pairs: Sequence[EncodedPair], objectives: Sequence[str], n: int
) -> list[EncodedPair]:
    """At least n pairs, among them one labelled for each objective."""
    first = {next(k for k, p in enumerate(pairs) if p.labels[name]) for name in objectives}
    rest = (k for k in range(len(pairs)) if k not in first)
    return [pairs[k] for k in sorted({*first, *(k for k, _ in zip(rest, range(n), strict=False))})]
