"""What a preference loss is: options, each with a rule, and one number for every ranked pair."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from raco_fast.dpo.losses.pair_scores import RankedScores


def option(default: float, rule: str, holds: Callable[[float], bool], cure: str) -> Any:
    """A field of a loss: its default, and what a value must do (`rule`, as in "be positive")."""
    return field(default=default, metadata={"rule": rule, "holds": holds, "cure": cure})


def beta(default: float = 0.1) -> Any:
    """The option `beta`: strength of the pull to the reference; scales the implicit reward."""
    rule = "be positive and finite"
    return option(default, rule, lambda v: 0 < v < math.inf, f"{default:g} is a common value")


SUM, MEAN = "log-probability", "log-probability per token"
"""Values of `pair_function`: h(y) = log p(y), and h(y) = log p(y) / tokens(y)."""


@dataclass(frozen=True)
class PreferenceLoss(ABC):
    """A loss of ranked pairs; its fields are its options.

    It may depend on the parameters through `logps_w` and `logps_l` alone: otherwise one backward
    pass could not serve all objectives.

    Attributes:
        soft: a label that is right with probability q gives q loss(w, l) + (1 - q) loss(l, w), and
            the margin at which that is smallest grows with q. False: soft labels are refused.
        takes_rewards: it sees the rewards that other objectives give the responses
            (`RankedScores.other_w`), which a config names as `margin_rewards`.
        tail_weight: factor of the log-probabilities, also the reference's, of those tokens that
            the longer response has past the length of the shorter one.
        pair_function: declares that chosen and rejected may share their prompt's rows.
    """

    soft: ClassVar[bool] = False
    takes_rewards: ClassVar[bool] = False

    @property
    def pair_function(self) -> Hashable | None:
        """The h of a loss that is a function of h(w) - h(l) for every pair; None for others.

        Two responses whose losses all have one h are parallel in A = ∂L/∂scores, so that one
        backward pass serves both on the rows of a shared prompt. Equal values stand for the same h,
        up to a constant factor and a constant.
        """
        return None

    def __post_init__(self) -> None:
        """Hold every option against its rule; ValueError names both."""
        for each in fields(self):
            value, known = getattr(self, each.name), each.metadata
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if known and not (number and known["holds"](value)):
                raise ValueError(
                    f"`{each.name}` must {known['rule']}, got {value!r}; {known['cure']}"
                )

    @abstractmethod
    def __call__(self, pairs: RankedScores) -> Tensor:
        """Loss of each of n pairs, [n]."""

    @property
    def tail_weight(self) -> float:
        """1: scores are plain sums over the response."""
        return 1.0

    @property
    def reward_scale(self) -> float:
        """Implicit reward over log-ratio: beta, 1 for a loss without one."""
        return float(getattr(self, "beta", 1.0))
