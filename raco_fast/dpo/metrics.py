"""Metrics under TRL's names.

`rewards/*` and `logps/*` describe labelled (pair, objective) entries; a suffix `/<objective>`
restricts them to one objective. `raco/*` describe the combination of the gradients.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raco_fast.dpo.losses.pair_scores import PairScores, RankedScores
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.solver.solution import DualSolution


class PreferenceMetrics:
    """Accumulates preference statistics over batches without leaving the device.

    Rewards are the loss's beta (1 without one) times the log-ratio to the reference whatever the
    loss is (also for SimPO, which does without a reference), so that losses can be compared.

    A margin of exactly zero (policy = reference, as at step 0) counts as half a correct ranking,
    which is what tossing a coin would give. TRL counts it as wrong.
    """

    def __init__(self, losses: Mapping[str, PreferenceLoss]) -> None:
        self._losses = losses
        self._sums: dict[str, Tensor] = {}
        self._pairs: dict[str, int] = {}

    def add(
        self, scores: PairScores | Mapping[str, PairScores], labels: Mapping[str, Tensor]
    ) -> None:
        """Count the labelled pairs of one batch; arguments as in `preference_losses`.

        A soft label counts for its likelier response; 0.5, which has none, is left out.
        """
        for name, label in labels.items():
            of_objective = scores if isinstance(scores, PairScores) else scores[name]
            chosen, pairs = of_objective.labelled(label * (label.abs() != 0.5))
            if chosen.numel():
                each = _statistics(pairs, self._losses[name].reward_scale)
                self._names = tuple(each)
                sums = torch.stack(list(each.values())).double().sum(dim=1)
                self._sums[name] = self._sums.get(name, 0) + sums
                self._pairs[name] = self._pairs.get(name, 0) + chosen.numel()

    def result(self) -> dict[str, float]:
        """Means over all labelled entries, and per objective with its number of pairs."""
        if not self._pairs:
            return {}
        total = torch.stack(list(self._sums.values())).sum(dim=0) / sum(self._pairs.values())
        result = dict(zip(self._names, total.tolist(), strict=True))
        for name, sums in self._sums.items():
            means = (sums / self._pairs[name]).tolist()
            result |= {f"{key}/{name}": v for key, v in zip(self._names, means, strict=True)}
            result[f"pairs/{name}"] = self._pairs[name]
        return result


@torch.no_grad()
def _statistics(pairs: RankedScores, scale: float) -> dict[str, Tensor]:
    """Metric -> its values, [n], of n labelled pairs."""
    chosen, rejected = scale * pairs.ratio_w, scale * pairs.ratio_l
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": _ranked_right(chosen - rejected),
        "logps/chosen": pairs.logps_w,
        "logps/rejected": pairs.logps_l,
        "logps/accuracies": _ranked_right(pairs.logps_w - pairs.logps_l),
    }


def _ranked_right(margin: Tensor) -> Tensor:
    """1 where the margin is positive, 0 where negative, one half at exactly zero."""
    return (margin.sign() + 1) / 2


def solution_metrics(solution: DualSolution, objectives: Sequence[str]) -> dict[str, float]:
    """`raco/*`: how the gradients were combined in one step; NaN for what a rule does not have."""
    clip_active = solution.clip_active
    result: dict[str, float] = {
        "raco/gap": float(solution.gap),
        "raco/clip_active": float("nan" if clip_active is None else clip_active),
        "raco/g0_norm": float(solution.g0_norm),
        "raco/update_norm": float(solution.update_norm),
    }
    for i, name in enumerate(objectives):
        result[f"raco/p/{name}"] = float(solution.p[i])
        result[f"raco/coefficient/{name}"] = float(solution.coefficients[i])
        result[f"raco/grad_norm/{name}"] = float(solution.gram[i, i]) ** 0.5
        for j in range(i + 1, len(objectives)):
            result[f"raco/cosine/{name}:{objectives[j]}"] = float(solution.cosines[i, j])
    return result
