"""f-DPO: -log s(beta (h(r_w) - h(r_l))), h(log u) = f'(u) up to a constant (arXiv:2309.16240).

h(r) = r is the reverse KL divergence, which is DPO's own (`sigmoid`).
"""

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor

from raco_fast.dpo.losses.pair_scores import RankedScores
from raco_fast.dpo.losses.preference_loss import PreferenceLoss, beta, option

LARGEST_EXPONENT = 40.0
"""exp(-r) is held constant beyond it, where a response is e^40 times less likely than under the
reference: e^45 squared, as in the norm of a gradient, overflows float32, and so does e^89."""


@dataclass(frozen=True)
class _FDivergence(PreferenceLoss):
    soft = True
    beta: float = beta()

    @abstractmethod
    def h(self, ratio: Tensor) -> Tensor:
        """f'(exp(ratio)), less a constant."""

    @property
    def pair_function(self) -> Hashable:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        options.pop("beta")
        return type(self), *options.items()

    def __call__(self, pairs: RankedScores) -> Tensor:
        return -F.logsigmoid(self.beta * (self.h(pairs.ratio_w) - self.h(pairs.ratio_l)))


@dataclass(frozen=True)
class ForwardKl(_FDivergence):
    """h(r) = -exp(-r), from -1 / u."""

    def h(self, ratio: Tensor) -> Tensor:
        return -(-ratio).clamp(max=LARGEST_EXPONENT).exp()


@dataclass(frozen=True)
class JensenShannon(_FDivergence):
    """h(r) = log s(r), from log(u / (1 + u))."""

    def h(self, ratio: Tensor) -> Tensor:
        return F.logsigmoid(ratio)


@dataclass(frozen=True)
class AlphaDivergence(_FDivergence):
    """h(r) = (1 - exp(-alpha r)) / alpha, from (1 - u^-alpha) / alpha.

    Between reverse KL (alpha towards 0) and forward KL (1). TRL's coefficient is 1 - alpha.
    """

    alpha: float = option(
        0.5, "be in (0, 1)", lambda v: 0 < v < 1, "its ends are `sigmoid` and `forward-kl`"
    )

    def h(self, ratio: Tensor) -> Tensor:
        return -(-self.alpha * ratio).clamp(max=LARGEST_EXPONENT).expm1() / self.alpha
