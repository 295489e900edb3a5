"""What the study's jobs hand back; plain data that crosses process borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class WarmStart:
    """The starting point that every alignment of one seed shares.

    Args:
        seed: the seed.
        state: the model's parameters by name.
        losses: supervised loss per summary token (nats), one entry a step.
        ref_logps: float32 [2, pairs], log-probabilities of the summaries a and b of each pair.
        scores: objective -> mean judged score of the summaries it writes, before alignment.
        seconds: time the job took.
    """

    seed: int
    state: dict[str, npt.NDArray[Any]]
    losses: list[float]
    ref_logps: npt.NDArray[np.float32]
    scores: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Aligned:
    """One aligned model.

    Args:
        seed, rule: which start, which rule.
        weights: objective -> weight; None for a rule that ignores weights.
        scores: objective -> mean judged score of the summaries it writes.
        steps: the metrics of each optimizer step, under the names of DESIGN.md.
        skipped_steps: steps not taken because a gradient was not finite.
        seconds: time the job took.
    """

    seed: int
    rule: str
    weights: dict[str, float] | None
    scores: dict[str, float]
    steps: list[dict[str, float]]
    skipped_steps: int
    seconds: float
