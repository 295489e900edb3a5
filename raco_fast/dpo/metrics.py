"""Metrics under TRL's names.

`rewards/*` and `logps/*` describe labelled (pair, objective) entries; a suffix `/<objective>`
restricts them to one objective. `raco/*` describe the combination of the gradients.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.losses.pair_scores import PairScores, RankedScores
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.solver.expected_gram import Estimate
from raco_fast.solver.solution import DualSolution


class PreferenceMetrics:
    """Accumulates preference statistics over batches without leaving the device.

    Rewards are the loss's beta (1 without one) times the log-ratio to the reference whatever the
    loss is (also for SimPO, which does without a reference), so that losses can be compared.

    A margin of exactly zero (policy = reference, as at step 0) counts as half a correct ranking,
    which is what tossing a coin would give. TRL counts it as wrong. A score that is not finite
    ranks nothing: its pair makes the mean NaN.
    """

    def __init__(self, losses: Mapping[str, PreferenceLoss]) -> None:
        self._losses = losses
        self._sums: dict[str, Tensor] = {}
        self._pairs = dict.fromkeys(losses, 0)

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
                sums = _statistics(pairs, self._losses[name].reward_scale).double().sum(dim=1)
                self._sums[name] = self._sums.get(name, 0) + sums
                self._pairs[name] += chosen.numel()

    def result(self, processes: Processes | None = None) -> dict[str, float]:
        """Means over all labelled entries, and per objective with its number of pairs.

        Args:
            processes: the entries of all of them count; each has to ask.
        """
        sums = torch.zeros(len(self._losses), len(_STATISTICS) + 1, dtype=torch.float64)
        for row, (name, pairs) in zip(sums, self._pairs.items(), strict=True):
            if pairs:
                row[:-1], row[-1] = self._sums[name], pairs
        sums = sums if processes is None else processes.sum(sums)
        of_all = sums.sum(dim=0)
        if not of_all[-1]:
            return {}
        result = dict(zip(_STATISTICS, (of_all[:-1] / of_all[-1]).tolist(), strict=True))
        for name, (*each, pairs) in zip(self._pairs, sums.tolist(), strict=True):
            if pairs:
                result |= {f"{k}/{name}": s / pairs for k, s in zip(_STATISTICS, each, strict=True)}
                result[f"pairs/{name}"] = int(pairs)
        return result


_STATISTICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
)


@torch.no_grad()
def _statistics(pairs: RankedScores, scale: float) -> Tensor:
    """[len(_STATISTICS), n]: their values for n labelled pairs."""
    chosen, rejected = scale * pairs.ratio_w, scale * pairs.ratio_l
    rewards = [chosen, rejected, chosen - rejected, _ranked_right(chosen - rejected)]
    accuracies = _ranked_right(pairs.logps_w - pairs.logps_l)
    return torch.stack([*rewards, pairs.logps_w, pairs.logps_l, accuracies])


def _ranked_right(margin: Tensor) -> Tensor:
    """1 where the margin is positive, 0 where negative, one half at exactly zero; else NaN.

    The sign of NaN is 0: a model that has diverged would rank half of the pairs right.
    """
    return torch.where(margin.isfinite(), (margin.sign() + 1) / 2, torch.nan)


def solution_metrics(solution: DualSolution, objectives: Sequence[str]) -> dict[str, float]:
    """`raco/*`: how the gradients were combined in one step; NaN for what a rule does not have."""
    clip_active = solution.clip_active
    result: dict[str, float] = {
        "raco/gap": float(solution.gap),
        "raco/clip_active": float("nan" if clip_active is None else clip_active),
        "raco/g0_norm": float(solution.g0_norm),
        "raco/update_norm": float(solution.update_norm),
        "raco/c": float(solution.c),
    }
    for i, name in enumerate(objectives):
        result[f"raco/weight/{name}"] = float(solution.weights[i])
        result[f"raco/p/{name}"] = float(solution.p[i])
        result[f"raco/coefficient/{name}"] = float(solution.coefficients[i])
        result[f"raco/grad_norm/{name}"] = float(solution.gram[i, i]) ** 0.5
        for j in range(i + 1, len(objectives)):
            result[f"raco/cosine/{name}:{objectives[j]}"] = float(solution.cosines[i, j])
    if (cosines := solution.cosines_in_metric) is not None:
        for i, name in enumerate(objectives):
            for j in range(i + 1, len(objectives)):
                result[f"raco/cosine_adam/{name}:{objectives[j]}"] = float(cosines[i, j])
    if solution.expected is not None:
        result |= expected_metrics(solution.expected, solution.coefficients, objectives)
    return result


def expected_metrics(
    expected: Estimate, coefficients: Tensor, objectives: Sequence[str]
) -> dict[str, float]:
    """`raco/*` of gram="unbiased": what is known of the expected gradients; NaN where nothing is.

    Args:
        expected: of a solution.
        coefficients: [m], of the gradients in its update.
        objectives: in their order.
    """
    result = {"raco/shrinkage": expected.shrinkage, "raco/gram_steps": expected.steps}
    descent = expected.mean @ torch.as_tensor(coefficients).numpy()
    for i, name in enumerate(objectives):
        result[f"raco/descent/{name}"] = float(descent[i])
        result[f"raco/noise_share/{name}"] = float(expected.noise_share[i])
        result[f"raco/noise_scale/{name}"] = float(expected.noise_scale[i])
        for j in range(i + 1, len(objectives)):
            pair = f"{name}:{objectives[j]}"
            result[f"raco/cosine_unbiased/{pair}"] = float(expected.cosines[i, j])
            result[f"raco/cosine_unbiased_se/{pair}"] = float(expected.cosine_errors[i, j])
    return result
