"""What finished runs say of the rules: printed, as JSON, and as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raco_fast.dpo.run.files import atomic_file
from raco_fast.pages.figures import NO_PICTURE, has_pictures
from raco_fast.pages.html_page import Table, html_page
from raco_fast.report import text_table
from raco_fast.studies.comparison import compared_groups
from raco_fast.studies.groups import Study, study_of
from raco_fast.studies.json_content import json_content
from raco_fast.studies.outcomes import read_outcomes
from raco_fast.studies.pareto_config import ParetoConfig
from raco_fast.studies.pictures import pictures
from raco_fast.studies.tables import tables


@dataclass(frozen=True)
class ParetoReport:
    """What finished runs come to.

    Args:
        notes: what a reader has to know first, a sentence or two each.
        tables: those of the report.
        content: the same as plain JSON values, in full precision.
        pictures: name -> SVG.
    """

    notes: Sequence[str]
    tables: Sequence[Table]
    content: Mapping[str, Any]
    pictures: Mapping[str, str]

    def __str__(self) -> str:
        """Notes and tables for a terminal."""
        texts = [f"{table.title}\n{text_table(table.columns, table.rows)}" for table in self.tables]
        return "\n\n".join(["\n".join(self.notes), *texts])


def pareto(config: ParetoConfig) -> ParetoReport:
    """Compare finished runs; writes `report.html`, `pareto.json` and the pictures.

    Raises:
        ValueError, OSError: as `read_outcomes` and `study_of`; a file could not be written.
    """
    outcomes, unfinished = read_outcomes(config.runs, config.metric)
    study = study_of(outcomes, config)
    comparisons = compared_groups(study, config.resamples, config.seed)
    notes = [*_what_it_is(study, config), *_what_is_missing(study, unfinished)]
    made = tables(study, comparisons)
    content = {"notes": notes, **json_content(study, config, comparisons)}
    report = ParetoReport(notes, made, content, pictures(study, config.metric))
    _write(report, config.folder)
    return report


def _write(report: ParetoReport, folder: Path) -> None:
    files = {
        "report.html": html_page(
            "Fronts of held-out preferences", report.notes, report.tables, report.pictures
        ),
        "pareto.json": json.dumps(report.content, indent=1, allow_nan=False),
        **{f"{name}.svg": text for name, text in report.pictures.items()},
    }
    for name, text in files.items():
        with atomic_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _what_it_is(study: Study, config: ParetoConfig) -> Iterator[str]:
    less = "; less is better, and a gain is how much less" if study.sign < 0 else ""
    values = study.shown(study.reference).items()
    reference = ", ".join(f"{name} {value:g}" for name, value in values)
    yield (
        f"Held-out {config.metric} after the last step{less}. After ±, half of the 95 % Student "
        f"interval of a mean over seeds. Reference point: {reference}."
    )


def _what_is_missing(study: Study, unfinished: Sequence[Path]) -> Iterator[str]:
    points = [point for group in study.groups for point in group.points]
    if alone := sum(len(point.values) < 2 for point in points):
        which = "every point" if alone == len(points) else f"{alone} of {len(points)} points"
        yield f"One seed alone at {which}: no interval over seeds; sweep `seed` to have one."
    for group in study.groups:
        seeds = {seed for point in group.points for seed in point.values}
        if missing := sorted(seeds - {*group.seeds}):
            yield (
                f"{group.name}: not all of its points have the seeds {missing}, which are left out "
                f"of fronts and comparisons."
            )
        below = int((~(group.means > study.reference).all(axis=1)).sum())
        if below:
            yield (
                f"{group.name}: {below} of {len(group.points)} points are not better than the "
                f"reference point in every objective and add no hypervolume."
            )
    if unfinished:
        yield f"Not finished, and left out: {len(unfinished)} runs, the first {unfinished[0]}."
    if not has_pictures():
        yield NO_PICTURE
