"""Losses of log-probabilities per token, without a reference model."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raco_fast.dpo.losses.pair_scores import RankedScores
from raco_fast.dpo.losses.preference_loss import MEAN, PreferenceLoss, beta, option


@dataclass(frozen=True)
class Simpo(PreferenceLoss):
    """-log s(beta (l_w/n_w - l_l/n_l) - gamma): SimPO (arXiv:2405.14734, Eq. 6).

    `gamma` is the margin asked for, in units of the reward: the published gamma-beta ratio times
    beta.
    """

    soft = True
    beta: float = beta()
    gamma: float = option(0.5, "be finite", math.isfinite, "0.5 is common")

    @property
    def pair_function(self) -> Hashable:
        return MEAN

    def __call__(self, pairs: RankedScores) -> Tensor:
        return -F.logsigmoid(self.beta * (pairs.mean_w - pairs.mean_l) - self.gamma)


@dataclass(frozen=True)
class AmopoStatic(PreferenceLoss):
    """-log s(beta (l_w/n_w - l_l/n_l)): the AMoPO baseline of arXiv:2602.02495.

    SimPO without a margin. AMoPO itself asks for every objective in a prompt of its own and draws
    the weights anew at every step.
    """

    soft = True
    beta: float = beta()

    @property
    def pair_function(self) -> Hashable:
        return MEAN

    def __call__(self, pairs: RankedScores) -> Tensor:
        return -F.logsigmoid(self.beta * (pairs.mean_w - pairs.mean_l))


@dataclass(frozen=True)
class Cpo(PreferenceLoss):
    """-log s(beta (l_w - l_l)) - alpha l_w/n_w: CPO (arXiv:2401.08417).

    The likelihood term is a mean over the tokens of each pair; TRL's is one over the tokens of the
    batch, in which long responses count more.
    """

    soft = True
    beta: float = beta()
    alpha: float = option(1.0, "be at least 0 and finite", lambda v: 0 <= v < math.inf, "try 1")

    def __call__(self, pairs: RankedScores) -> Tensor:
        preference = -F.logsigmoid(self.beta * (pairs.logps_w - pairs.logps_l))
        return preference - self.alpha * pairs.mean_w


@dataclass(frozen=True)
class Orpo(PreferenceLoss):
    """-x_w - lam log s(o), o = log-odds(x_w) - log-odds(x_l), x = l/n.

    ORPO (arXiv:2403.07691, Eq. 6 and 7); log-odds(x) = x - log(1 - exp(x)). `lam` is TRL's beta.
    """

    soft = True
    lam: float = option(0.1, "be positive and finite", lambda v: 0 < v < math.inf, "0.1 is common")

    def __call__(self, pairs: RankedScores) -> Tensor:
        odds = _log_odds(pairs.mean_w) - _log_odds(pairs.mean_l)
        return -pairs.mean_w - self.lam * F.logsigmoid(odds)


def _log_odds(x: Tensor) -> Tensor:
    """x - log(1 - exp(x)), finite also for x = 0, tokens that are certain to rounding."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return x - (-x.expm1()).log()
