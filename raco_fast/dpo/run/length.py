"""How long a run is, its warm-up, and what becomes of the schedule of a longer resumed run."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR

from raco_fast.dpo.run.config import TrainConfig

logger = logging.getLogger(__name__)


def warm_up_steps(ratio: float, total: int) -> int:
    """Steps of the warm-up, in which the learning rate rises from 0.

    Raises:
        ValueError: the run has one step and it is the warm-up's first, which changes nothing.
    """
    steps = round(ratio * total)
    if steps and total == 1:
        raise ValueError(
            f"`warmup_ratio` must leave the only step of this run a learning rate, got {ratio}, "
            f"which makes it the warm-up's first step, of learning rate 0; set it to 0, or train "
            f"for more steps"
        )
    return steps


def odd_settings(config: TrainConfig, pairs: int, total: int) -> list[str]:
    """What a run of `total` steps over `pairs` training pairs does otherwise than it reads."""
    steps = config.epochs * -(-pairs // config.pairs_per_step)
    asked = config.max_steps or 0
    warm_up = round(config.warmup_ratio * total)
    found = {
        f"`warmup_ratio` {config.warmup_ratio} makes {warm_up} of {total} steps the warm-up: the "
        f"learning rate never reaches `lr`": warm_up >= total,
        f"`max_steps` {asked} is more than the {steps} steps of {config.epochs} epoch(s); raise "
        f"`epochs` to take them": asked > steps,
        f"`pairs_per_step` {config.pairs_per_step} is more than the {pairs} training pairs: every "
        f"step takes all of them": config.pairs_per_step > pairs,
        "`eval_every` has no effect without `eval_data`": config.eval_every
        and not config.eval_data,
    }
    for name, what in (("eval_every", "evaluations between"), ("log_every", "records of steps")):
        every = getattr(config, name)
        late = every is not None and every > total
        found[f"`{name}` {every} is more than the {total} steps of the run: no {what}"] = late
    return [text for text, holds in found.items() if holds]


def check_total(done: int, before: int | None, now: int, checkpoint: Path) -> None:
    """Say what another number of steps than the checkpoint's run had comes to.

    Args:
        done: steps at the checkpoint.
        before, now: steps of the whole run; None in a checkpoint that does not tell.
    Raises:
        ValueError: more steps are done already.
    """
    if now < done:
        raise ValueError(
            f"`max_steps` and `epochs` must give at least the {done} steps that {checkpoint} has "
            f"done, got {now}; raise them, or choose another `output_dir`"
        )
    if before is not None and before != now:
        logger.info(
            "the run has %d steps instead of %d: warm-up and schedule are those of %d steps, "
            "taken up at step %d",
            now,
            before,
            now,
            done,
        )


def follow_schedule(scheduler: LambdaLR) -> None:
    """Set the learning rates of the step that comes next; a checkpoint has those it was to have.

    With as many steps as before they are the same, bit for bit.
    """
    state = scheduler.state_dict()
    rates = [
        base * factor(state["last_epoch"])
        for base, factor in zip(state["base_lrs"], scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.load_state_dict({**state, "_last_lr": rates})
