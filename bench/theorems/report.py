"""The theorems' part of docs/results.md, and its picture, from the committed records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.theorems.run import OBJECTIVES, RADII, RESULT, RULES, SEEDS, STEPS
from raco_fast.dpo.run.files import atomic_file
from raco_fast.report import markdown_table

_SHOWN = 0.4
"""The radius that the picture is drawn for."""


def part() -> list[str]:
    """Paragraphs and tables."""
    records = json.loads(RESULT.read_text(encoding="utf-8"))
    return [
        "## Theorems 3.1 and 3.2",
        f"On {SEEDS} random problems for each number of objectives (robust least squares: "
        "nonconvex, of known smoothness; bench/theorems/problem.py), by plain gradient descent "
        "with the longest step allowed, one over the smoothness of L_w. With AdamW neither theorem "
        "applies literally.",
        "**3.1**: min over t < T of M(θ_t)² is at most 2 L_w(θ_0) / (η (1 - c²) T). The largest "
        f"share of the bound that was reached, over the problems and T up to {STEPS}:",
        _rates(records["rates"]),
        "![M and its bound](results/theorem-3.1.png)",
        "**3.2**: with two objectives, clipping does not lessen the decrease of L_w that the "
        "descent lemma promises. Steps of the descent at which the promise is larger or smaller "
        "with clipping (by more than 1e-9 of ‖g0‖ in the direction's product with g0/‖g0‖); for "
        "more objectives nothing is claimed:",
        _certificates(records["certificates"]),
        "Again: `python -m bench.theorems.run`.",
    ]


def _rates(records: list[dict[str, Any]]) -> str:
    rows = []
    for m in OBJECTIVES:
        for rule in RULES:
            of_rule = [r for r in records if r["objectives"] == m and r["rule"] == rule]
            shares = (max(r["worst"] for r in of_rule if r["c"] == c) for c in RADII)
            rows.append((str(m), f"`{rule}`", *(f"{share:.3f}" for share in shares)))
    return markdown_table(("objectives", "rule", *(f"c = {c}" for c in RADII)), rows)


def _certificates(records: list[dict[str, Any]]) -> str:
    rows = []
    for m in OBJECTIVES:
        for c in RADII:
            found = [r for r in records if r["objectives"] == m and r["c"] == c]
            steps, larger, smaller = (
                sum(r[name] for r in found) for name in ("steps", "larger", "smaller")
            )
            ends = (
                f"{min(r['least'] for r in found):+.1e} to {max(r['largest'] for r in found):+.1e}"
            )
            rows.append((str(m), str(c), str(steps), str(larger), str(smaller), ends))
    titles = ("objectives", "c", "steps", "larger with clipping", "smaller", "change")
    return markdown_table(titles, rows)


def draw(destination: Path) -> None:
    """M² over T beside its bound, the median problem and the range of all, as a PNG."""
    from matplotlib.figure import Figure

    records = json.loads(RESULT.read_text(encoding="utf-8"))["rates"]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, m in zip(figure.subplots(1, len(OBJECTIVES), sharey=True), OBJECTIVES, strict=True):
        chosen = [r for r in records if r["objectives"] == m and r["c"] == _SHOWN]
        for rule in RULES:
            of_rule = [r for r in chosen if r["rule"] == rule]
            least = np.array([r["least"] for r in of_rule])
            (line,) = axes.loglog(of_rule[0]["T"], np.median(least, 0), label=rule)
            axes.fill_between(
                of_rule[0]["T"], least.min(0), least.max(0), alpha=0.12, color=line.get_color()
            )
        bounds = np.array([r["bound"] for r in chosen])
        axes.loglog(chosen[0]["T"], np.median(bounds, 0), "k--", label="bound")
        axes.set(title=f"{m} objectives, c = {_SHOWN}", xlabel="T")
    figure.axes[0].set_ylabel("min over t < T of M²")
    figure.axes[0].legend(frameon=False)
    with atomic_file(destination) as partial:
        figure.savefig(partial, format="png", dpi=110)
