"""What a run begins with beside its model: optimizer, schedule, and what identifies it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.models import trainable
from raco_fast.dpo.run.checkpoint import TrainingState
from raco_fast.dpo.run.identity import identity
from raco_fast.dpo.run.length import warm_up_steps
from raco_fast.dpo.run.moving_reference import MovingReference
from raco_fast.dpo.run.reference_cache import data_hash
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR

    from raco_fast.dpo.run.config import TrainConfig
    from raco_fast.dpo.run.inputs import RunInputs
    from raco_fast.dpo.run.margin_rewards import MarginRewards


def new_state(
    config: TrainConfig,
    inputs: RunInputs,
    total_steps: int,
    reference: MovingReference | None,
    rewards: MarginRewards,
) -> TrainingState:
    """The state of a run before its first step.

    Args:
        reference: one that moves; None of a run whose reference stays.
        rewards: of the objectives that have margin rewards.
    """
    from transformers import get_scheduler

    trained = trainable(inputs.model).values()
    optimizer = ClippedCAGradAdamW(trained, **config.optimizer_arguments)
    # What transformers calls "constant" ignores the warm-up.
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    warm_up = warm_up_steps(config.warmup_ratio, total_steps)
    scheduler: LambdaLR = get_scheduler(schedule, optimizer, warm_up, total_steps)
    held_out = data_hash(inputs.held_out)
    run = {
        "settings": identity(config),
        "data": data_hash(inputs.training),
        "model": inputs.policy.model_hash,
        **({"margin_rewards": rewards.hashes} if config.margin_rewards else {}),
        "held_out": held_out,
        "held_out_at_first": held_out,
        "total_steps": total_steps,
    }
    of_run = (inputs.model, optimizer, scheduler, run)
    return TrainingState(*of_run, processes=Processes(), reference=reference)
