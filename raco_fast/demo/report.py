"""The study's outputs: the printed table, report.md, metrics.jsonl and pareto.png."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from raco_fast.demo.claims import claims
from raco_fast.demo.config import DemoConfig
from raco_fast.demo.jobs import Judged
from raco_fast.demo.judges import OBJECTIVES
from raco_fast.demo.plot import plot_scores
from raco_fast.demo.summary import Row, summarize
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.metrics_file import MetricsFile
from raco_fast.report import markdown_table, text_table

_HEADER = ("rule", "weights", *OBJECTIVES, "clipped", "cosine")
_QUICK = "**Quick form: the model is too small and too little trained to conclude from.**\n\n"
_REPORT = """\
# Three conflicting preferences in miniature

A small Llama is taught to summarise generated documents from summaries of mixed quality, then \
aligned by DPO on pairs labelled for coverage, brevity and faithfulness by exact rule-based \
judges. The same judges score one sampled summary of each of {documents} held-out documents a \
seed. Mean ± standard deviation over {seeds}; every score lies in [0, 1] and higher is better. \
Weights are coverage/brevity/faithfulness. `clipped` is the share of steps in which clipping \
changed the update, `cosine` the mean cosine between the gradients of two objectives.

{warning}{table}

{plot}

## What was found

A difference is called clear when the 95 % Student interval of its mean over seeds, taken seed by \
seed, leaves out zero (intervals are given after ±).

{claims}

## Conflict between objectives

Mean cosine between the gradients of two objectives, before weighting:

{cosines}

## Settings

{seconds:.0f} s in all. {settings}
"""


def write_reports(
    folder: Path, config: DemoConfig, results: Sequence[Judged], seconds: float
) -> None:
    """Print the table and write metrics.jsonl, pareto.png (with matplotlib) and report.md.

    Args:
        folder: an existing folder; files of an earlier study in it are replaced.
        config: the settings the models were made with.
        results: the starts, then every seed's alignments, in the same order for every seed.
        seconds: wall-clock time of the study.
    """
    rows = summarize(results)
    metrics = MetricsFile(folder / "metrics.jsonl")
    for result in results:
        of_model = {"seed": result.seed, "rule": result.rule, "weights": result.weights}
        phase = "warm-up" if result.rule == "start" else "alignment"
        for step in result.steps:
            metrics.write({"phase": phase, **of_model, **step})
        scores = {f"judge/{name}": score for name, score in result.scores.items()}
        metrics.write({"phase": "judged", **of_model, **scores})
    plot_note = plot_scores(rows, folder / "pareto.png")
    with atomic_file(folder / "report.md") as partial:
        partial.write_text(markdown(config, rows, plot_note, seconds), encoding="utf-8")
    print(f"\n{terminal_table(rows)}\n\n{_bullets(rows)}")
    print(plot_note or f"\nplot: {folder / 'pareto.png'}")
    print(f"report: {folder / 'report.md'}; metrics: {folder / 'metrics.jsonl'}")


def terminal_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    return text_table(_HEADER, map(_cells, rows))


def markdown(config: DemoConfig, rows: Sequence[Row], plot_note: str, seconds: float) -> str:
    """The text of report.md."""
    _, *aligned = rows
    seeds = len(rows[0].scores["coverage"].values)
    settings = dataclasses.asdict(config).items()
    cosines = [(row.rule, row.weights_text, *map(str, row.cosines.values())) for row in aligned]
    return _REPORT.format(
        documents=config.documents,
        seeds=f"{seeds} seed{'s' * (seeds > 1)}",
        warning=_QUICK if config.quick else "",
        table=markdown_table(_HEADER, map(_cells, rows)),
        plot=plot_note or "![judged scores](pareto.png)",
        claims=_bullets(rows),
        cosines=markdown_table(("rule", "weights", *aligned[0].cosines), cosines),
        seconds=seconds,
        settings=", ".join(f"{name} = {value}" for name, value in settings),
    )


def _bullets(rows: Sequence[Row]) -> str:
    return "\n".join(f"- {sentence}" for sentence in claims(rows))


def _cells(row: Row) -> tuple[str, ...]:
    clipped = cosine = "-"
    if row.clipped is not None:
        clipped = f"{row.clipped.mean:.0%}"
        cosine = f"{sum(c.mean for c in row.cosines.values()) / len(row.cosines):+.2f}"
    scores = (str(row.scores[name]) for name in OBJECTIVES)
    return (row.rule, row.weights_text, *scores, clipped, cosine)
