"""The study's outputs: the printed table, report.md, metrics.jsonl and pareto.png."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raco_fast.demo.claims import claims
from raco_fast.demo.config import DemoConfig
from raco_fast.demo.judges import OBJECTIVES
from raco_fast.demo.plot import plot_scores
from raco_fast.demo.results import Aligned, WarmStart
from raco_fast.demo.summary import Row, Spread, summarize, weights_name
from raco_fast.dpo.run.files import atomic_file
from raco_fast.report import markdown_table

_HEADER = ("rule", "weights", *OBJECTIVES, "clipped", "cosine")


def write_reports(
    folder: Path,
    config: DemoConfig,
    starts: Sequence[WarmStart],
    runs: Sequence[Aligned],
    *,
    seconds: float,
) -> None:
    """Print the table and write metrics.jsonl, pareto.png (with matplotlib) and report.md.

    Args:
        folder: an existing folder; each file in it is replaced as a whole.
        config: the settings the runs were made with.
        starts: one per seed.
        runs: every seed's alignments, seed by seed in the order of `starts`.
        seconds: wall-clock time of the study.
    """
    rows = summarize(starts, runs)
    with atomic_file(folder / "metrics.jsonl") as partial:
        partial.write_text(
            "".join(f"{json.dumps(record)}\n" for record in metric_records(starts, runs)),
            encoding="utf-8",
        )
    plot_note = plot_scores(rows, folder / "pareto.png")
    with atomic_file(folder / "report.md") as partial:
        partial.write_text(markdown(config, rows, plot_note, seconds), encoding="utf-8")
    print(f"\n{text_table(rows)}\n")
    for sentence in claims(rows):
        print(f"- {sentence}")
    print(plot_note or f"\nplot: {folder / 'pareto.png'}")
    print(f"report: {folder / 'report.md'}; metrics: {folder / 'metrics.jsonl'}")


def metric_records(
    starts: Sequence[WarmStart], runs: Sequence[Aligned]
) -> Iterator[dict[str, Any]]:
    """Every measured number, one record for each line of metrics.jsonl."""
    for start in starts:
        for step, loss in enumerate(start.losses, start=1):
            yield {"phase": "warm-up", "seed": start.seed, "step": step, "loss": loss}
        yield {"phase": "judged", "seed": start.seed, "rule": "start"} | _judged(start.scores)
    for run in runs:
        of_run = {"seed": run.seed, "rule": run.rule, "weights": run.weights}
        for metrics in run.steps:
            numbers = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            yield {"phase": "alignment", **of_run, **numbers}
        yield {"phase": "judged", **of_run} | _judged(run.scores)


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal, columns aligned."""
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(config: DemoConfig, rows: Sequence[Row], plot_note: str, seconds: float) -> str:
    """The text of report.md."""
    seeds = len(rows[0].scores["coverage"].values)
    settings = dataclasses.asdict(config)
    return "\n".join(
        [
            "# Three conflicting preferences in miniature",
            "",
            "A small Llama is taught to summarise generated documents from summaries of mixed "
            "quality, then aligned by DPO on pairs labelled for coverage, brevity and "
            "faithfulness by exact rule-based judges. The same judges score one sampled summary "
            f"of each of {config.documents} held-out documents a seed. "
            f"Mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}; every score lies in "
            "[0, 1] and higher is better. Weights are coverage/brevity/faithfulness. `clipped` is "
            "the share of steps in which clipping changed the update, `cosine` the mean cosine "
            "between the gradients of two objectives.",
            "",
            *_quick_warning(config),
            markdown_table(_HEADER, (_cells(row) for row in rows)),
            "",
            plot_note or "![judged scores](pareto.png)",
            "",
            "## What was found",
            "",
            "A difference is called clear when the 95 % Student interval of its mean over seeds, "
            "taken seed by seed, leaves out zero (intervals are given after ±).",
            "",
            *(f"- {sentence}" for sentence in claims(rows)),
            "",
            "## Conflict between objectives",
            "",
            "Mean cosine between the gradients of two objectives, before weighting:",
            "",
            _cosine_table(rows),
            "",
            "## Settings",
            "",
            f"{seconds:.0f} s in all. "
            + ", ".join(f"{name} = {value}" for name, value in settings.items()),
            "",
        ]
    )


def _quick_warning(config: DemoConfig) -> list[str]:
    if not config.quick:
        return []
    return ["**Quick form: the model is too small and too little trained to conclude from.**", ""]


def _cosine_table(rows: Sequence[Row]) -> str:
    aligned = rows[1:]
    pairs = tuple(aligned[0].cosines)
    lines = [
        (row.rule, weights_name(row.weights), *(_pm(row.cosines[p]) for p in pairs))
        for row in aligned
    ]
    return markdown_table(("rule", "weights", *pairs), lines)


def _cells(row: Row) -> tuple[str, ...]:
    scores = [_pm(row.scores[name]) for name in OBJECTIVES]
    clipped = "-" if row.clip_active is None else f"{row.clip_active.mean:.0%}"
    cosine = "-"
    if row.cosines:
        cosine = f"{sum(c.mean for c in row.cosines.values()) / len(row.cosines):+.2f}"
    return (row.rule, weights_name(row.weights), *scores, clipped, cosine)


def _pm(spread: Spread) -> str:
    if len(spread.values) == 1:
        return f"{spread.mean:.3f}"
    return f"{spread.mean:.3f} ± {spread.deviation:.3f}"


def _judged(scores: dict[str, float]) -> dict[str, float]:
    return {f"judge/{name}": value for name, value in scores.items()}
