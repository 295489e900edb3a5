"""The settings of a comparison of fronts, and the held-out metrics that it can be made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from raco_fast.dpo.data.choices import check_choices
from raco_fast.settings.paths import expanded


class Metric(NamedTuple):
    """A metric of docs/metrics.md.

    Args:
        prefix: of its name, before the objective.
        sign: -1 where less is better.
        least: the worst value that it can have, +-inf where there is none.
    """

    prefix: str
    sign: float
    least: float


METRICS = {
    "accuracy": Metric("eval_rewards/accuracies/", 1.0, 0.0),
    "likelihood": Metric("eval_logps/accuracies/", 1.0, 0.0),
    "margin": Metric("eval_rewards/margins/", 1.0, -math.inf),
    "loss": Metric("eval_loss/", -1.0, math.inf),
}


@dataclass(frozen=True)
class ParetoConfig:
    """What is read from finished runs, and how it is compared.

    Args:
        runs: folders of finished runs, or of sweeps.
        by: settings by their dotted names that tell fronts apart beside the rule, such as `c`.
        metric: of the held-out pairs after the last step: `accuracy` and `margin` of the implicit
            reward, `likelihood` (accuracy of log-probabilities alone), or `loss`, where less is
            better.
        reference: objective -> the value that hypervolume and rays are measured from; it should be
            no better than any run. None: 0 for the accuracies, the least there is; margins and
            losses need one.
        resamples: of each bootstrap.
        seed: of the bootstrap.
        output_dir: where report.html, pareto.json and the pictures go.
    """

    runs: list[str]
    by: list[str] = field(default_factory=list)
    metric: Literal["accuracy", "likelihood", "margin", "loss"] = "accuracy"
    reference: dict[str, float] | None = None
    resamples: int = 2000
    seed: int = 0
    output_dir: str = "runs/pareto"

    def __post_init__(self) -> None:
        """Check what can be checked before the runs are read."""
        check_choices(self)
        if not self.runs:
            raise ValueError("`runs` must name at least one folder of finished runs, got none")
        if self.resamples < 100:
            raise ValueError(
                f"`resamples` must be at least 100, got {self.resamples}: the ends of a 95 % "
                f"interval are told by one in forty of them"
            )
        if "rule" in self.by or "seed" in self.by:
            raise ValueError(
                f"`by` must name settings beside the rule and the seed, got {self.by}: every rule "
                f"has a front of its own, and seeds are what intervals are over; take them out"
            )
        if self.reference is None and math.isinf(METRICS[self.metric].least):
            raise ValueError(
                f"`reference` must be given for the metric {self.metric!r}, which has no worst "
                f"value; write one for each objective, such as `reference: {{helpful: -1.0, ...}}`"
            )

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return expanded(self.output_dir, "output_dir")

    def reference_of(self, objectives: Sequence[str]) -> tuple[float, ...]:
        """The reference point in the order of the objectives, as the metric is.

        Raises:
            ValueError: it has other objectives, or a value that is not finite.
        """
        if self.reference is None:
            return (METRICS[self.metric].least,) * len(objectives)
        if {*self.reference} != {*objectives} or not all(
            math.isfinite(value) for value in self.reference.values()
        ):
            raise ValueError(
                f"`reference` must have a finite number for each of {list(objectives)}, got "
                f"{self.reference}; correct it"
            )
        return tuple(self.reference[name] for name in objectives)
