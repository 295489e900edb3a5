"""A trained model as a reward: how a config names it, and what goes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.registry import LOSSES, loss_name

_ROUNDING = 1e-6


@dataclass(frozen=True)
class RewardSource:
    """A model trained by DPO, whose implicit reward is beta (log p(y) - log p_ref(y)).

    Args:
        name: hub name or folder; of an adapter that PEFT has saved, or of a model.
        weight: of the reward in the loss; above 0.
        beta: that of its training.
        base: the model below an adapter, where that is not what its adapter_config.json names; it
            is the reference.
        reference: the model that a whole model was trained from.
    """

    name: str
    weight: float
    beta: float = 0.1
    base: str | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        for key, value in (("weight", self.weight), ("beta", self.beta)):
            if not value > 0:
                raise ValueError(
                    f"`margin_rewards`: `{key}` of {self.name!r} must be above 0, got {value}; "
                    f"leave out what is not to count"
                )
        if self.base is not None and self.reference is not None:
            raise ValueError(
                f"`margin_rewards`: {self.name!r} must have a `base`, of an adapter, or a "
                f"`reference`, of a model, got both; leave one of them out"
            )


def check_rewards(
    rewards: Mapping[str, Sequence[RewardSource]], losses: Mapping[str, PreferenceLoss]
) -> None:
    """Raise ValueError unless the losses that see rewards have some, whose weights sum to 1.

    Args:
        rewards: objective -> its sources.
        losses: of all objectives.
    """
    takers = sorted(name for name, loss in LOSSES.items() if loss.takes_rewards)
    for name in rewards:
        if name not in losses:
            raise ValueError(
                f"`margin_rewards` must name objectives in `weights`, got {name!r} for "
                f"{sorted(losses)}; correct the name"
            )
    for name, loss in losses.items():
        given = rewards.get(name, ())
        if bool(given) != loss.takes_rewards:
            raise ValueError(
                f"`margin_rewards` are for the losses {takers}, which need some, got {len(given)} "
                f"for {name!r} with the loss {loss_name(loss)!r}; set both or none"
            )
        own = getattr(loss, "weight", None)
        if given and own is not None:
            total = own + sum(source.weight for source in given)
            if not abs(total - 1) <= _ROUNDING:
                raise ValueError(
                    f"`margin_rewards.{name}` must have weights that sum to 1 with the `weight` of "
                    f"the loss, got {total:g}; its own is {own:g}"
                )
