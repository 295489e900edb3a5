"""The study's outputs: the printed table, report.md, metrics.jsonl and pareto.png."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from raco_fast.demo.claims import claims, difference
from raco_fast.demo.config import DemoConfig
from raco_fast.demo.hypervolumes import Front, fronts_of
from raco_fast.demo.jobs import Judged
from raco_fast.demo.plot import plot_scores
from raco_fast.demo.summary import Row, summarize
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.metrics_file import MetricsFile
from raco_fast.report import markdown_table, text_table
from raco_fast.solver.gram_options import GRAMS
from raco_fast.studies.spread import Spread

_VOLUME_HEADER = ("rule", "points", *(f"hypervolume, {gram}" for gram in GRAMS), "unbiased - batch")
_QUICK = "**Quick form: the model is too small and too little trained to conclude from.**\n\n"
_REPORT = """\
# Conflicting preferences in miniature

A small Llama is taught to summarise generated documents from summaries of mixed quality, then \
aligned by DPO on pairs labelled for {objectives} by exact rule-based judges. The same judges \
score one sampled summary of each of {documents} held-out documents a seed. Mean over {seeds} ± \
half of its 95 % Student interval; every score lies in [0, 1] and higher is better. Weights are \
{order}. `gram` is the Gram matrix that a rule finds a conflict in: of a batch's gradients, as in \
the paper, or the unbiased estimate of that of their expectation, which is ours. `clipped` is the \
share of steps in which clipping changed the update, `cosine` the mean cosine between the \
gradients of two objectives in a step.

{warning}{table}

{plot}

## Hypervolume

The volume of scores that a rule's weight vectors reach together, above 0 in every objective: \
that of each seed, then mean and interval. It grows with the number of points.

{volumes}

## What was found

A difference is called clear when the 95 % Student interval of its mean over seeds, taken seed by \
seed, leaves out zero (intervals are given after ±). What is not clear is said first.

{claims}

## Conflict between objectives

Mean cosine between the gradients of two objectives in a step, before weighting:

{cosines}
{expected}
## Settings

{seconds:.0f} s in all. {settings}
"""
_EXPECTED = """
Cosine between their expected gradients, as it is estimated at the last step:

{table}
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
        of_model = {name: getattr(result, name) for name in ("seed", "rule", "gram", "weights")}
        phase = "warm-up" if result.rule == "start" else "alignment"
        for step in result.steps:
            metrics.write({"phase": phase, **of_model, **step})
        scores = {f"judge/{name}": score for name, score in result.scores.items()}
        metrics.write({"phase": "judged", **of_model, **scores})
    plot_note = plot_scores(rows, folder / "pareto.png")
    with atomic_file(folder / "report.md") as partial:
        partial.write_text(markdown(config, rows, plot_note, seconds), encoding="utf-8")
    volumes = text_table(_VOLUME_HEADER, _volumes(rows))
    print(f"\n{terminal_table(rows)}\n\n{volumes}\n\n{_bullets(rows)}")
    print(plot_note or f"\nplot: {folder / 'pareto.png'}")
    print(f"report: {folder / 'report.md'}; metrics: {folder / 'metrics.jsonl'}")


def terminal_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    return text_table(_header(rows), map(_cells, rows))


def markdown(config: DemoConfig, rows: Sequence[Row], plot_note: str, seconds: float) -> str:
    """The text of report.md."""
    _, *aligned = rows
    seeds = len(rows[0].scores["coverage"].values)
    settings = dataclasses.asdict(config).items()
    return _REPORT.format(
        documents=config.documents,
        seeds=f"{seeds} seed{'s' * (seeds > 1)}",
        warning=_QUICK if config.quick else "",
        table=markdown_table(_header(rows), map(_cells, rows)),
        plot=plot_note or "![judged scores](pareto.png)",
        claims=_bullets(rows),
        cosines=_cosine_table(aligned, {row.name: row.cosines for row in aligned}),
        expected=_expected(aligned),
        objectives=_listed(config.names),
        order="/".join(config.names),
        volumes=markdown_table(_VOLUME_HEADER, _volumes(rows)),
        seconds=seconds,
        settings=", ".join(f"{name} = {value}" for name, value in settings),
    )


def _header(rows: Sequence[Row]) -> tuple[str, ...]:
    return ("rule", "gram", "weights", *rows[0].scores, "clipped", "cosine")


def _listed(names: Sequence[str]) -> str:
    """For example "coverage, brevity and faithfulness"."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _bullets(rows: Sequence[Row]) -> str:
    return "\n".join(f"- {sentence}" for sentence in claims(rows))


def _cells(row: Row) -> tuple[str, ...]:
    clipped = cosine = "-"
    if row.clipped is not None:
        clipped = f"{row.clipped.mean:.0%}"
        cosine = f"{sum(c.mean for c in row.cosines.values()) / len(row.cosines):+.2f}"
    scores = (score.with_interval() for score in row.scores.values())
    return (row.rule, row.gram or "-", row.weights_text, *scores, clipped, cosine)


def _volumes(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line a rule, its Gram matrices side by side."""
    _, *aligned = rows
    by_rule: dict[str, dict[str | None, Front]] = {}
    for front in fronts_of(aligned):
        by_rule.setdefault(front.rule, {})[front.gram] = front
    lines = []
    for rule, of_rule in by_rule.items():
        found = [of_rule.get(gram) for gram in GRAMS]
        batch, unbiased = found
        gain = difference(unbiased.volume - batch.volume) if batch and unbiased else "-"
        volumes = (front.volume.with_interval() if front else "-" for front in found)
        points = len(next(iter(of_rule.values())).weights)
        lines.append((rule, str(points), *volumes, gain))
    return lines


def _cosine_table(rows: Sequence[Row], cosines: Mapping[str, Mapping[str, Spread]]) -> str:
    """A line a row, a column a pair of objectives; a dash where there is no estimate."""
    pairs = list(rows[0].cosines)
    lines = []
    for row in rows:
        of_row = cosines[row.name]
        cells = (of_row[pair].with_interval() if pair in of_row else "-" for pair in pairs)
        lines.append((row.rule, row.gram or "-", row.weights_text, *cells))
    return markdown_table(("rule", "gram", "weights", *pairs), lines)


def _expected(aligned: Sequence[Row]) -> str:
    rows = [row for row in aligned if row.expected]
    if not rows:
        return ""
    table = _cosine_table(rows, {row.name: row.expected for row in rows})
    return _EXPECTED.format(table=table)
