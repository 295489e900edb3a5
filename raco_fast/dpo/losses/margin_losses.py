"""Losses of the margin between two log-ratios to the reference."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from raco_fast.dpo.losses.pair_scores import RankedScores
from raco_fast.dpo.losses.preference_loss import MEAN, SUM, PreferenceLoss, beta, option


@dataclass(frozen=True)
class Sigmoid(PreferenceLoss):
    """-(1 - e) log s(x) - e log s(-x), x = beta (r_w - r_l).

    DPO (arXiv:2305.18290, Eq. 7), with label smoothing e as in cDPO.
    """

    soft = True
    beta: float = beta()
    label_smoothing: float = option(
        0.0, "be in [0, 0.5)", lambda v: 0 <= v < 0.5, "at 0.5 a label says nothing"
    )

    @property
    def pair_function(self) -> Hashable:
        return SUM

    def __call__(self, pairs: RankedScores) -> Tensor:
        x, e = self.beta * pairs.margin, self.label_smoothing
        return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)


@dataclass(frozen=True)
class Modpo(PreferenceLoss):
    """-log s(R_w - R_l), R_y = (beta r_y - sum over k of w_k R_k(y)) / weight.

    MODPO (arXiv:2310.03708): the policy is the best one for weight R + sum w_k R_k, of which R is
    learnt from the labels and the R_k, rewards of other objectives, are known. The sum is
    `RankedScores.other_w`; `weight` is what the w_k leave of 1.
    """

    soft = True
    takes_rewards = True
    beta: float = beta()
    weight: float = option(
        0.5, "be in (0, 1)", lambda v: 0 < v < 1, "with those of `margin_rewards` it sums to 1"
    )

    @property
    def pair_function(self) -> Hashable:
        return SUM

    def __call__(self, pairs: RankedScores) -> Tensor:
        reward = self.beta * pairs.margin
        if pairs.other_w is not None and pairs.other_l is not None:
            reward = reward - (pairs.other_w - pairs.other_l)
        return -F.logsigmoid(reward / self.weight)


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """max(0, 1 - beta (r_w - r_l)): SLiC's hinge (arXiv:2305.10425) on DPO's margin."""

    beta: float = beta()

    @property
    def pair_function(self) -> Hashable:
        return SUM

    def __call__(self, pairs: RankedScores) -> Tensor:
        return F.relu(1 - self.beta * pairs.margin)


@dataclass(frozen=True)
class Ipo(PreferenceLoss):
    """(r_w/n_w - r_l/n_l - 1/(2 beta))^2.

    IPO (arXiv:2310.12036, Eq. 17), on log-ratios per token, as its authors advise.
    """

    soft = True
    beta: float = beta()

    @property
    def pair_function(self) -> Hashable:
        return MEAN

    def __call__(self, pairs: RankedScores) -> Tensor:
        return (pairs.mean_margin - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class SigmoidNorm(PreferenceLoss):
    """-log s(beta (r_w/n_w - r_l/n_l)): DPO on log-ratios per token.

    TRL's `sigmoid_norm`, open-instruct's `dpo_norm`.
    """

    soft = True
    beta: float = beta()

    @property
    def pair_function(self) -> Hashable:
        return MEAN

    def __call__(self, pairs: RankedScores) -> Tensor:
        return -F.logsigmoid(self.beta * pairs.mean_margin)


@dataclass(frozen=True)
class LengthDesensitized(Sigmoid):
    """`Sigmoid` of scores that count only alpha of the tokens past the other response's end.

    LD-DPO (arXiv:2409.06411): l = sum over t <= min(n_w, n_l) of log p_t + alpha (sum over the
    rest), likewise under the reference. 1 is DPO, 0 looks at the shorter length alone.
    """

    alpha: float = option(0.5, "be in [0, 1]", lambda v: 0 <= v <= 1, "1 is plain DPO")

    @property
    def tail_weight(self) -> float:
        return float(self.alpha)


@dataclass(frozen=True)
class Robust(PreferenceLoss):
    """(-(1 - e) log s(x) + e log s(-x)) / (1 - 2e), x = beta (r_w - r_l).

    Its mean over labels flipped with probability e is DPO's loss of the true labels (rDPO,
    arXiv:2403.00409). It has no lower bound.
    """

    beta: float = beta()
    label_smoothing: float = option(
        0.1, "be in [0, 0.5)", lambda v: 0 <= v < 0.5, "it is the share of flipped labels"
    )

    @property
    def pair_function(self) -> Hashable:
        return SUM

    def __call__(self, pairs: RankedScores) -> Tensor:
        x, e = self.beta * pairs.margin, self.label_smoothing
        return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


@dataclass(frozen=True)
class Exo(PreferenceLoss):
    """KL(p || t) of p = (s(x), s(-x)) from t = (1 - e, e), x = beta (r_w - r_l).

    EXO for pairs (arXiv:2402.00856); e is what the target leaves to the other response.
    """

    beta: float = beta()
    label_smoothing: float = option(
        1e-3, "be in (0, 0.5)", lambda v: 0 < v < 0.5, "at 0 the divergence is infinite"
    )

    @property
    def pair_function(self) -> Hashable:
        return SUM

    def __call__(self, pairs: RankedScores) -> Tensor:
        x, e = self.beta * pairs.margin, self.label_smoothing
        right = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-e))
        return right + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(e))


@dataclass(frozen=True)
class Discopop(PreferenceLoss):
    """(1 - k)(-log s(x)) + k exp(-x), k = s(x / tau), x = beta (r_w - r_l).

    DiscoPOP's log-ratio modulated loss (arXiv:2406.08414, Eq. 5). With tau above 1 it would grow
    exponentially to the left.
    """

    beta: float = beta()
    tau: float = option(0.05, "be in (0, 1]", lambda v: 0 < v <= 1, "0.05 is the published value")

    @property
    def pair_function(self) -> Hashable:
        return SUM

    def __call__(self, pairs: RankedScores) -> Tensor:
        x = self.beta * pairs.margin
        # k exp(-x) in one exponential: two factors would be 0 times infinity for a very negative x.
        exponential = (F.logsigmoid(x / self.tau) - x).exp()
        return exponential - (-x / self.tau).sigmoid() * F.logsigmoid(x)


@dataclass(frozen=True)
class DpoPositive(PreferenceLoss):
    """-log s(beta (r_w - r_l - lam max(0, -r_w))).

    DPO-Positive (Smaug, arXiv:2402.13228): a penalty where the preferred response becomes less
    likely than under the reference.
    """

    beta: float = beta()
    lam: float = option(50.0, "be at least 0 and finite", lambda v: 0 <= v < math.inf, "5 to 50")

    def __call__(self, pairs: RankedScores) -> Tensor:
        return -F.logsigmoid(self.beta * (pairs.margin - self.lam * F.relu(-pairs.ratio_w)))
