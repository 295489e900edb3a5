"""Scores of preference pairs: as responses a and b, and as preferred and other response."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from raco_fast.backends.transfer import sent


@dataclass(frozen=True)
class RankedScores:
    """What a loss sees of n pairs: w is the preferred response, l the other; fields are [n].

    Args:
        logps_w, logps_l: summed log-probability under the policy, with graph.
        ref_logps_w, ref_logps_l: the same under the reference model, without graph.
        tokens_w, tokens_l: scored tokens.
        other_w, other_l: weighted sums of the rewards that other objectives give the responses,
            for losses with `takes_rewards`; None: 0.
    """

    logps_w: Tensor
    logps_l: Tensor
    ref_logps_w: Tensor
    ref_logps_l: Tensor
    tokens_w: Tensor
    tokens_l: Tensor
    other_w: Tensor | None = None
    other_l: Tensor | None = None

    def swapped(self) -> "RankedScores":
        """The same pairs with the other response preferred."""
        return RankedScores(
            self.logps_l,
            self.logps_w,
            self.ref_logps_l,
            self.ref_logps_w,
            self.tokens_l,
            self.tokens_w,
            self.other_l,
            self.other_w,
        )

    def widened(self) -> "RankedScores":
        """In float64, where the device has it."""
        if self.logps_w.device.type == "mps":
            return self
        return replace(self, **{name: t.double() for name, t in _given(self).items()})

    @property
    def ratio_w(self) -> Tensor:
        """r_w = log(policy / reference): the implicit reward divided by beta."""
        return self.logps_w - self.ref_logps_w

    @property
    def ratio_l(self) -> Tensor:
        """r_l, of the other response."""
        return self.logps_l - self.ref_logps_l

    @property
    def margin(self) -> Tensor:
        """r_w - r_l."""
        return self.ratio_w - self.ratio_l

    @property
    def mean_margin(self) -> Tensor:
        """r_w / n_w - r_l / n_l: of log-ratios per token."""
        return self.ratio_w / self.tokens_w - self.ratio_l / self.tokens_l

    @property
    def mean_w(self) -> Tensor:
        """logps_w / n_w: log-probability per token of the preferred response."""
        return self.logps_w / self.tokens_w

    @property
    def mean_l(self) -> Tensor:
        """logps_l / n_l."""
        return self.logps_l / self.tokens_l


@dataclass(frozen=True)
class PairScores:
    """Scores of B preference pairs; every field is a float32 [B] tensor.

    Args:
        logps_a, logps_b: summed log-probability of each response under the policy, with graph.
        ref_logps_a, ref_logps_b: the same under the reference model, without graph.
        tokens_a, tokens_b: scored tokens in each response.
        other_a, other_b: as in `RankedScores`.
    """

    logps_a: Tensor
    logps_b: Tensor
    ref_logps_a: Tensor
    ref_logps_b: Tensor
    tokens_a: Tensor
    tokens_b: Tensor
    other_a: Tensor | None = None
    other_b: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "PairScores":
        """The pairs at an int64 [n] index."""
        return replace(self, **{name: t[index] for name, t in _given(self).items()})

    def labelled(self, label: Tensor) -> tuple[Tensor, RankedScores]:
        """The n pairs of a [B] label that is not 0: their int64 [n] index and ranked scores.

        Selected, not multiplied by zero: a NaN in a pair without a label stays out. With `label`
        on the CPU nothing waits for the GPU.
        """
        rows = label.nonzero().squeeze(-1)
        device = self.logps_a.device
        return rows, self[sent(rows, device)].ranked(sent(label[rows] > 0, device))

    def ranked(self, a_preferred: Tensor) -> RankedScores:
        """Every pair as (preferred, other); `a_preferred` is a bool [B]."""

        def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return torch.where(a_preferred, a, b), torch.where(a_preferred, b, a)

        other: tuple[Tensor, ...] = ()
        if self.other_a is not None and self.other_b is not None:
            other = both(self.other_a, self.other_b)
        return RankedScores(
            *both(self.logps_a, self.logps_b),
            *both(self.ref_logps_a, self.ref_logps_b),
            *both(self.tokens_a, self.tokens_b),
            *other,
        )


def _given(scores: RankedScores | PairScores) -> dict[str, Tensor]:
    """The fields that are not None."""
    named = {field.name: getattr(scores, field.name) for field in fields(scores)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
