"""The settings of the study."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from raco_fast.solver.gram_options import GRAMS
from raco_fast.solver.registry import RuleLike, check_rule, label_of, spec_of
from raco_fast.solver.weights import check_c

_QUICK: dict[str, Any] = {
    "seeds": 2,
    "steps": 4,
    "batch_size": 4,
    "warm_up_steps": 25,
    "warm_up_batch_size": 4,
    "hidden_size": 32,
    "layers": 2,
    "documents": 12,
    "workers": 1,
}


@dataclass(frozen=True)
class DemoConfig:
    """Settings of `raco-fast demo`; the defaults take about four minutes on two cores.

    Args:
        output_dir: folder for report.md, pareto.png and metrics.jsonl.
        quick: a version of some seconds that shows the machinery works; its model is too small
            and its training too short for its scores to mean anything. Overrides the sizes below.
        seed: first seed.
        seeds: number of seeds; each has its own model, data and sampling.
        rules: the rules to compare: names of docs/rules.md, or {name: ..., option: ...}.
            `cagrad`, which cagrad-clip clips, is left out for the time it takes.
        grams: "batch", "unbiased" or both: the Gram matrix that rules find a conflict in. linear,
            which looks for none, runs once, as "batch".
        coverage_weights: one weight vector for each of these weights of coverage; what is left
            beside the weight of faithfulness goes to brevity.
        faithfulness_weight: weight of faithfulness in every weight vector.
        c: radius of the search around the weighted gradient, 0 <= c < 1.
        beta: strength of DPO's pull towards the warmed-up model.
        lr: learning rate of the alignment, after a rise over the first tenth of its steps.
        steps: optimizer steps of one alignment.
        batch_size: preference pairs in a step.
        warm_up_steps: supervised steps before.
        warm_up_batch_size: pairs of summaries in a supervised step.
        warm_up_lr: peak learning rate of the warm-up.
        hidden_size: width of the model, a multiple of 8.
        layers: depth of the model.
        documents: held-out documents that every model summarises to be judged.
        workers: worker processes; 0 means one a core, at most 4; 1 runs in this process.
    """

    output_dir: str = "runs/demo"
    quick: bool = False
    seed: int = 0
    seeds: int = 5
    rules: tuple[str | dict[str, Any], ...] = ("linear", "cagrad-clip", "mgda")
    grams: tuple[str, ...] = GRAMS
    coverage_weights: tuple[float, ...] = (0.65, 0.4, 0.15)
    faithfulness_weight: float = 0.2
    c: float = 0.4
    beta: float = 0.1
    lr: float = 3e-4
    steps: int = 30
    batch_size: int = 8
    warm_up_steps: int = 260
    warm_up_batch_size: int = 8
    warm_up_lr: float = 1.5e-3
    hidden_size: int = 160
    layers: int = 3
    documents: int = 160
    workers: int = 0

    def __post_init__(self) -> None:
        """Reject settings the study cannot run with."""
        rules = tuple(spec_of(check_rule(rule)) for rule in self.rules)
        object.__setattr__(self, "rules", rules)
        check_c(self.c)
        rest = 1 - self.faithfulness_weight
        counts = ("seeds", "steps", "batch_size", "warm_up_steps", "warm_up_batch_size", "layers")
        conditions = [
            *((n, getattr(self, n) >= 1, "be at least 1") for n in (*counts, "documents")),
            *((n, 0 < getattr(self, n) < math.inf, "be positive") for n in ("lr", "warm_up_lr")),
            ("beta", 0 < self.beta < math.inf, "be positive"),
            ("workers", self.workers >= 0, "be 0 (one a core) or more"),
            ("hidden_size", self.hidden_size in range(8, 10**6, 8), "be a multiple of 8"),
            ("faithfulness_weight", 0 <= rest <= 1, "be in [0, 1]"),
            (
                "coverage_weights",
                all(0 <= weight <= rest + 1e-9 for weight in self.coverage_weights),
                f"lie in [0, {rest:g}], which is what `faithfulness_weight` leaves",
            ),
        ]
        known = all(gram in GRAMS for gram in self.grams)
        conditions.append(("grams", known, f"be of {', '.join(GRAMS)}"))
        for name in ("rules", "grams", "coverage_weights"):
            values = getattr(self, name)
            distinct = values and all(v not in values[:i] for i, v in enumerate(values))
            conditions.append((name, distinct, "hold different values, at least one"))
        for name, holds, rule in conditions:
            if not holds:
                raise ValueError(f"`{name}` must {rule}, got {getattr(self, name)}")

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

    @property
    def points(self) -> list[tuple[RuleLike, str, dict[str, float] | None]]:
        """Every rule with every Gram matrix and weight vector.

        A rule that ignores weights once, with None; one that ignores the Gram, with "batch".
        """
        return [
            (rule, gram, weights)
            for rule in self.rules
            for gram in (("batch",) if label_of(check_rule(rule)) == "linear" else self.grams)
            for weights in (self.weight_vectors if check_rule(rule).uses_weights else [None])
        ]

    def sized(self) -> DemoConfig:
        """This configuration, with the sizes of the quick form if `quick` is set."""
        return replace(self, **_QUICK) if self.quick else self
