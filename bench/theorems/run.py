"""Measure both theorems: `python -m bench.theorems.run` (some minutes), into bench/results/.

Theorem 3.1: for η <= 1/ℓ_w and c < 1, min over t < T of M(θ_t)² <= 2 L_w(θ_0) / (η (1 − c²) T).
It is run with the largest η on problems whose ℓ_w is known. Theorem 3.2: with two objectives, the
decrease of L_w that the descent lemma promises for a step is at least as large with the clipped
direction as without clipping. With G0 = g0 + s u, ‖u‖ = 1, s = c ‖g0‖, and η ℓ_w <= 1 that promise,
η ⟨g0, G0⟩ − η² ℓ_w ‖G0‖² / 2, grows with ⟨g0, u⟩, which is what is compared, in units of ‖g0‖.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.theorems.problem import Problem, descend
from raco_fast.solver.dual import solve_dual

RESULT = Path(__file__).resolve().parent.parent / "results" / "theorems.json"
SEEDS, STEPS = 10, 1000
RADII = (0.2, 0.4, 0.8)
OBJECTIVES = (2, 3, 6)
RULES = ("linear", "cagrad", "cagrad-clip")
_TIMES = np.unique(np.geomspace(1, STEPS, 40).astype(int))


def rates() -> list[dict[str, Any]]:
    """Per problem, rule and radius: min over t < T of M² and its bound at some T."""
    records = []
    for m in OBJECTIVES:
        for seed in range(SEEDS):
            problem = Problem.draw(seed, m)
            for c in RADII:
                for rule in RULES:
                    steps = list(descend(problem, rule, c, STEPS))
                    least = np.minimum.accumulate([step.criticality for step in steps])
                    scale = 2 * steps[0].loss * problem.smoothness / (1 - c**2)
                    records.append(
                        {
                            "objectives": m,
                            "seed": seed,
                            "c": c,
                            "rule": rule,
                            "T": _TIMES.tolist(),
                            "least": [float(f"{least[T - 1]:.4g}") for T in _TIMES],
                            "bound": [float(f"{scale / T:.4g}") for T in _TIMES],
                            "worst": float(
                                f"{(least * np.arange(1, STEPS + 1)).max() / scale:.4g}"
                            ),
                        }
                    )
    return records


def certificates() -> list[dict[str, Any]]:
    """Per problem: ⟨g0, u⟩ / ‖g0‖ of the clipped minus the unclipped direction along a descent."""
    records = []
    for m in OBJECTIVES:
        for seed in range(SEEDS):
            problem = Problem.draw(seed, m)
            for c in RADII:
                steps = list(descend(problem, "cagrad-clip", c, 300))
                grams = np.stack([step.gram for step in steps])
                change = _along(grams, problem, c, "cagrad-clip") - _along(
                    grams, problem, c, "cagrad"
                )
                records.append(
                    {
                        "objectives": m,
                        "seed": seed,
                        "c": c,
                        "steps": len(change),
                        "larger": int((change > 1e-9).sum()),
                        "smaller": int((change < -1e-9).sum()),
                        "least": float(f"{change.min():.3g}"),
                        "largest": float(f"{change.max():.3g}"),
                    }
                )
    return records


def _along(grams: np.ndarray, problem: Problem, c: float, rule: str) -> np.ndarray:
    """⟨g0, u⟩ / ‖g0‖ of every Gram matrix, from ⟨g0, G0⟩ = ‖g0‖² + c ‖g0‖ ⟨g0, u⟩."""
    alpha = np.asarray(solve_dual(grams, problem.w, c, rule).coefficients)
    squared = np.einsum("i,nij,j->n", problem.w, grams, problem.w)
    along = np.einsum("i,nij,nj->n", problem.w, grams, alpha)
    return (along - squared) / (c * squared)


def main() -> None:
    """Write the records."""
    found = {"rates": rates(), "certificates": certificates()}
    RESULT.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
