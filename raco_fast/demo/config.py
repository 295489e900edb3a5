"""The settings of the study."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from raco_fast.solver.registry import check_rule, spec_of
from raco_fast.solver.weights import RULES, check_c


@dataclass(frozen=True)
class DemoConfig:
    """Settings of `raco-fast demo`; the defaults take three to five minutes on two cores.

    Args:
        output_dir: folder for report.md, pareto.png and metrics.jsonl.
        quick: a version of some seconds that shows the machinery works; its model is too small
            and its training too short for its scores to mean anything. Overrides the sizes below.
        seed: first seed.
        seeds: number of seeds; each has its own model, data and sampling.
        rules: the rules to compare: names of docs/rules.md, or {name: ..., option: ...}.
        coverage_weights: one weight vector for each of these weights of coverage; what is left
            beside the weight of faithfulness goes to brevity.
        faithfulness_weight: weight of faithfulness in every weight vector.
        c: radius of the search around the weighted gradient, 0 <= c < 1.
        beta: strength of DPO's pull towards the warmed-up model.
        lr: learning rate of the alignment.
        steps: optimizer steps of one alignment.
        batch_size: preference pairs in a step.
        warm_up_steps: supervised steps before.
        warm_up_batch_size: summaries in a supervised step.
        warm_up_lr: peak learning rate of the warm-up.
        hidden_size: width of the model, a multiple of 8.
        layers: depth of the model.
        documents: held-out documents that every model summarises to be judged.
        workers: worker processes; 0 means one a core, at most 4; 1 runs in this process.
    """

    output_dir: str = "runs/demo"
    quick: bool = False
    seed: int = 0
    seeds: int = 3
    rules: tuple[str | dict[str, Any], ...] = RULES
    coverage_weights: tuple[float, ...] = (0.65, 0.4, 0.15)
    faithfulness_weight: float = 0.2
    c: float = 0.4
    beta: float = 0.1
    lr: float = 3e-4
    steps: int = 30
    batch_size: int = 8
    warm_up_steps: int = 260
    warm_up_batch_size: int = 16
    warm_up_lr: float = 1.5e-3
    hidden_size: int = 160
    layers: int = 3
    documents: int = 160
    workers: int = 0

    def __post_init__(self) -> None:
        """Reject settings the study cannot run with."""
        counts = ("seeds", "steps", "batch_size", "warm_up_steps", "warm_up_batch_size")
        for name in (*counts, "layers", "documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("beta", "lr", "warm_up_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"`workers` must be 0 (one a core) or more, got {self.workers}")
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(f"`hidden_size` must be a multiple of 8, got {self.hidden_size}")
        object.__setattr__(self, "rules", tuple(spec_of(check_rule(rule)) for rule in self.rules))
        check_c(self.c)
        self._check_weights()

    def _check_weights(self) -> None:
        for name in ("rules", "coverage_weights"):
            values = getattr(self, name)
            if not values or any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f"`{name}` must hold different values, at least one, got {values}")
        rest = 1 - self.faithfulness_weight
        if not 0 <= rest <= 1:
            raise ValueError(
                f"`faithfulness_weight` must be in [0, 1], got {self.faithfulness_weight}"
            )
        for weight in self.coverage_weights:
            if not 0 <= weight <= rest + 1e-9:
                raise ValueError(
                    f"`coverage_weights` must lie in [0, {rest:g}], which is what "
                    f"`faithfulness_weight` leaves, got {weight}"
                )

    @property
    def weight_vectors(self) -> tuple[dict[str, float], ...]:
        """Objective -> weight, one mapping for each of `coverage_weights`."""
        return tuple(
            {
                "coverage": coverage,
                "brevity": max(0.0, round(1 - self.faithfulness_weight - coverage, 9)),
                "faithfulness": self.faithfulness_weight,
            }
            for coverage in self.coverage_weights
        )

    def sized(self) -> DemoConfig:
        """This configuration, with the sizes of the quick form if `quick` is set."""
        if not self.quick:
            return self
        return replace(
            self,
            seeds=2,
            coverage_weights=(0.6, 0.2),
            faithfulness_weight=0.2,
            steps=4,
            batch_size=4,
            warm_up_steps=25,
            warm_up_batch_size=8,
            hidden_size=32,
            layers=2,
            documents=12,
            workers=1,
        )
