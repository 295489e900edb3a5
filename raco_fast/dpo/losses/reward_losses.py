"""Losses that look at each response's implicit reward by itself, not at their difference alone."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from raco_fast.dpo.losses.pair_scores import RankedScores
from raco_fast.dpo.losses.preference_loss import PreferenceLoss, beta


@dataclass(frozen=True)
class Nca(PreferenceLoss):
    """-log s(beta r_w) - log s(-beta r_w) / 2 - log s(-beta r_l) / 2: NCA (arXiv:2402.05369)."""

    soft = True
    beta: float = beta()

    def __call__(self, pairs: RankedScores) -> Tensor:
        w, other = self.beta * pairs.ratio_w, self.beta * pairs.ratio_l
        return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-other)


@dataclass(frozen=True)
class Bco(PreferenceLoss):
    """-log s(beta r_w) - log s(-beta r_l).

    Binary classifier optimisation (arXiv:2404.04656) for pairs, as TRL's `bco_pair`: without the
    running mean that the paper subtracts from the rewards.
    """

    soft = True
    beta: float = beta()

    def __call__(self, pairs: RankedScores) -> Tensor:
        return -F.logsigmoid(self.beta * pairs.ratio_w) - F.logsigmoid(-self.beta * pairs.ratio_l)


@dataclass(frozen=True)
class Sppo(PreferenceLoss):
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2.

    SPPO (arXiv:2405.00675, Eq. 4.7) with probabilities of 0 and 1.
    """

    soft = True
    beta: float = beta()

    def __call__(self, pairs: RankedScores) -> Tensor:
        target = 1 / (2 * self.beta)
        return (pairs.ratio_w - target).square() + (pairs.ratio_l + target).square()


@dataclass(frozen=True)
class ApoZero(PreferenceLoss):
    """1 - s(beta r_w) + s(beta r_l): APO-zero (arXiv:2408.06266, Eq. 7).

    For preferred responses that are better than the model: they become more likely.
    """

    beta: float = beta()

    @property
    def pair_function(self) -> Hashable:
        """h(r) = s(beta r)."""
        return type(self), self.beta

    def __call__(self, pairs: RankedScores) -> Tensor:
        # Where s is near 1 the factor 1 - s of its derivative is a difference, whose rounding in
        # float32 would set the two labels of a pair apart.
        wide = pairs.widened()
        loss = (-self.beta * wide.ratio_w).sigmoid() + (self.beta * wide.ratio_l).sigmoid()
        return loss.to(pairs.logps_w.dtype)


@dataclass(frozen=True)
class ApoDown(PreferenceLoss):
    """s(beta r_w) + 1 - s(beta (r_w - r_l)): APO-down (arXiv:2408.06266, Eq. 8).

    For preferred responses that are worse than the model: both become less likely.
    """

    beta: float = beta()

    def __call__(self, pairs: RankedScores) -> Tensor:
        return (self.beta * pairs.ratio_w).sigmoid() + (-self.beta * pairs.margin).sigmoid()
