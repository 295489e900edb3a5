"""Preference losses: one function per loss, one scalar per objective.

Every loss is a function of two per-sequence scores, the summed log-probabilities of the responses
a and b. For objective i with labels s in {-1, 0, +1} over the B pairs of a batch,

    L_i = 1/n_i  sum over labelled b of  loss(s_b, scores_b),      n_i = pairs labelled for i.

That L_i depends on the parameters only through the scores is what later allows one backward pass
for all objectives, so nothing here may look at a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """Scores of B preference pairs; every field is a float32 [B] tensor.

    Args:
        logps_a, logps_b: summed log-probability of each response under the policy, with graph.
        ref_logps_a, ref_logps_b: the same under the reference model, without graph.
        tokens_a, tokens_b: scored tokens in each response.
    """

    logps_a: Tensor
    logps_b: Tensor
    ref_logps_a: Tensor
    ref_logps_b: Tensor
    tokens_a: Tensor
    tokens_b: Tensor

    def __getitem__(self, index: Tensor) -> PairScores:
        """The pairs at an int64 [n] index."""
        return PairScores(
            self.logps_a[index],
            self.logps_b[index],
            self.ref_logps_a[index],
            self.ref_logps_b[index],
            self.tokens_a[index],
            self.tokens_b[index],
        )

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference) of responses a and b: the implicit rewards divided by beta."""
        return self.logps_a - self.ref_logps_a, self.logps_b - self.ref_logps_b

    def labelled(self, label: Tensor) -> tuple[PairScores, Tensor]:
        """The n pairs of a [B] label that is not 0, and their labels [n] beside the scores.

        Selected, not multiplied by zero: a NaN in a pair without a label stays out. With `label`
        on the CPU nothing waits for the GPU.
        """
        rows = label.nonzero().squeeze(-1)
        return self[rows.to(self.logps_a.device)], label[rows].to(self.logps_a)


@dataclass(frozen=True)
class LossOptions:
    """Hyper-parameters of the preference losses.

    Args:
        beta: strength of the pull towards the reference; scales the implicit reward.
        label_smoothing: assumed share of flipped labels, in [0, 0.5); for `sigmoid` only.
        simpo_gamma: reward margin SimPO asks for; for `simpo` only.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5

    def __post_init__(self) -> None:
        """Reject values no loss is defined for."""
        if not 0 < self.beta < math.inf:
            raise ValueError(
                f"`beta` must be positive and finite, got {self.beta}; 0.1 is a common value"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"`label_smoothing` must be in [0, 0.5), got {self.label_smoothing}; "
                "at 0.5 a label says nothing"
            )
        if not math.isfinite(self.simpo_gamma):
            raise ValueError(f"`simpo_gamma` must be finite, got {self.simpo_gamma}; 0.5 is common")


PreferenceLoss = Callable[[PairScores, Tensor, LossOptions], Tensor]
"""(scores of n labelled pairs, labels [n] in {-1, +1}, options) -> loss per pair [n]."""


def sigmoid_loss(scores: PairScores, label: Tensor, options: LossOptions) -> Tensor:
    """DPO (arXiv:2305.18290, Eq. 7), with label smoothing as in cDPO."""
    ratio_a, ratio_b = scores.log_ratios()
    logits = options.beta * label * (ratio_a - ratio_b)
    eps = options.label_smoothing
    return -(1 - eps) * F.logsigmoid(logits) - eps * F.logsigmoid(-logits)


def hinge_loss(scores: PairScores, label: Tensor, options: LossOptions) -> Tensor:
    """Hinge on the implicit-reward margin (SLiC, arXiv:2305.10425, on DPO's margin)."""
    ratio_a, ratio_b = scores.log_ratios()
    return F.relu(1 - options.beta * label * (ratio_a - ratio_b))


def ipo_loss(scores: PairScores, label: Tensor, options: LossOptions) -> Tensor:
    """IPO (arXiv:2310.12036, Eq. 17) on per-token mean log-ratios, as its authors advise."""
    ratio_a, ratio_b = scores.log_ratios()
    margin = label * (ratio_a / scores.tokens_a - ratio_b / scores.tokens_b)
    return (margin - 1 / (2 * options.beta)).square()


def simpo_loss(scores: PairScores, label: Tensor, options: LossOptions) -> Tensor:
    """SimPO (arXiv:2405.14734, Eq. 6): per-token mean log-probabilities, no reference."""
    margin = label * (scores.logps_a / scores.tokens_a - scores.logps_b / scores.tokens_b)
    return -F.logsigmoid(options.beta * margin - options.simpo_gamma)


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "simpo": simpo_loss,
}
"""The losses by name; add a function here and it can be named in a config."""


def check_loss(name: str, options: LossOptions) -> PreferenceLoss:
    """The loss of that name; ValueError if there is none or it would ignore an option."""
    if name not in LOSSES:
        raise ValueError(f"`loss` must be one of {sorted(LOSSES)}, got {name!r}")
    if options.label_smoothing and name != "sigmoid":
        raise ValueError(
            f"`label_smoothing` is defined for the loss 'sigmoid' only, got "
            f"{options.label_smoothing} with {name!r}; set it to 0"
        )
    return LOSSES[name]


def preference_losses(
    scores: PairScores,
    labels: Mapping[str, Tensor],
    *,
    loss: str = "sigmoid",
    options: LossOptions | None = None,
    counts: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """One scalar loss per objective over the pairs labelled for it.

    Args:
        scores: of the B pairs of this (micro-)batch.
        labels: objective name -> [B] tensor: +1 response a is preferred, -1 response b,
            0 not labelled for this objective. Best on the CPU, see `PairScores.labelled`.
        loss: a key of `LOSSES`.
        options: beta, label smoothing and the like.
        counts: objective name -> number of labelled pairs to divide by. Give the counts of the
            whole optimizer step when it is accumulated over micro-batches, so that 1 x 8 and
            8 x 1 agree; by default the labelled pairs of this batch.
    Returns:
        Objective name -> float32 scalar. An objective without a labelled pair in this batch has
        the constant 0 without a graph (`requires_grad` is False): nothing to backpropagate.
    Raises:
        ValueError: unknown loss, or one that ignores an option; labels of another length than the
            scores; `counts` without one of the objectives.
    """
    options = options or LossOptions()
    pair_loss = check_loss(loss, options)
    missing = [] if counts is None else [name for name in labels if name not in counts]
    if missing:
        raise ValueError(f"`counts` must hold every objective in `labels`, got none for {missing}")
    result = {}
    for name, label in labels.items():
        if label.shape != scores.logps_a.shape:
            raise ValueError(
                f"labels[{name!r}] must have one entry a pair, shape {tuple(scores.logps_a.shape)},"
                f" got {tuple(label.shape)}"
            )
        chosen, sign = scores.labelled(label)
        if not sign.numel():
            result[name] = scores.logps_a.new_zeros(())
            continue
        count = sign.numel() if counts is None else counts[name]
        result[name] = pair_loss(chosen, sign, options).sum() / count
    return result


def preference_margins(scores: PairScores, label: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards (beta times the log-ratio) of the preferred and the other response.

    Args:
        scores: of n pairs.
        label: [n] in {-1, +1}.
        beta: the loss's beta.
    Returns:
        (chosen, rejected), each float32 [n], detached.
    Source: arXiv:2305.18290, Eq. 5 without its partition function, which cancels in a pair.
    """
    ratio_a, ratio_b = (beta * ratio.detach() for ratio in scores.log_ratios())
    first = label > 0
    return torch.where(first, ratio_a, ratio_b), torch.where(first, ratio_b, ratio_a)
