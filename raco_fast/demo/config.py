"""The settings of the study."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from raco_fast.demo.judges import OBJECTIVES
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
        objectives: how many, 2 to 6: the first of `raco_fast.demo.judges.OBJECTIVES`.
        coverage_shares: one weight vector for each of them. Every objective but coverage and
            brevity has the weight 1 / (objectives + 2); of the rest, coverage has this share.
        own_pairs: whether every pair is labelled for one objective, in turns, instead of for all.
        label_noise: the share of labels that are turned round, at random.
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
    objectives: int = 3
    coverage_shares: tuple[float, ...] = (0.8, 0.5, 0.2)
    own_pairs: bool = False
    label_noise: float = 0.0
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
        most = len(OBJECTIVES)
        counts = ("seeds", "steps", "batch_size", "warm_up_steps", "warm_up_batch_size", "layers")
        conditions = [
            *((n, getattr(self, n) >= 1, "be at least 1") for n in (*counts, "documents")),
            *((n, 0 < getattr(self, n) < math.inf, "be positive") for n in ("lr", "warm_up_lr")),
            ("beta", 0 < self.beta < math.inf, "be positive"),
            ("workers", self.workers >= 0, "be 0 (one a core) or more"),
            ("hidden_size", self.hidden_size in range(8, 10**6, 8), "be a multiple of 8"),
            ("objectives", self.objectives in range(2, most + 1), f"be 2 to {most}"),
            ("coverage_shares", all(0 <= s <= 1 for s in self.coverage_shares), "lie in [0, 1]"),
            ("label_noise", 0 <= self.label_noise < 0.5, "be in [0, 0.5)"),
        ]
        known = all(gram in GRAMS for gram in self.grams)
        conditions.append(("grams", known, f"be of {', '.join(GRAMS)}"))
        for name in ("rules", "grams", "coverage_shares"):
            values = getattr(self, name)
            distinct = values and all(v not in values[:i] for i, v in enumerate(values))
            conditions.append((name, distinct, "hold different values, at least one"))
        for name, holds, rule in conditions:
            if not holds:
                raise ValueError(f"`{name}` must {rule}, got {getattr(self, name)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives."""
        return OBJECTIVES[: self.objectives]

    @property
    def weight_vectors(self) -> tuple[dict[str, float], ...]:
        """Objective -> weight, one mapping for each of `coverage_shares`."""
        coverage, brevity, *further = self.names
        each = 1 / (self.objectives + 2)
        return tuple(
            {
                coverage: 4 * each * share,
                brevity: 4 * each * (1 - share),
                **dict.fromkeys(further, each),
            }
            for share in self.coverage_shares
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
