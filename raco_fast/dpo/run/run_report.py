"""What runs did, as one HTML page: curves, the first and last evaluation, the combination."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from raco_fast.dpo.run.curves import Record, curves
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.metrics_file import is_evaluation, read_records
from raco_fast.pages.figures import NO_PICTURE, has_pictures
from raco_fast.pages.html_page import Table, html_page
from raco_fast.report import share_with_interval, text_table

PAGE = "report.html"


def write_report(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Write `report.html` into a run's folder, from its metrics.jsonl.

    Args:
        settings: name -> value, for the table of settings.
    Returns:
        The page.
    Raises:
        ValueError, OSError: the metrics cannot be read or the page cannot be written.
    """
    records = read_records(folder / "metrics.jsonl")
    runs = {folder.name: records}
    tables = [evaluation_table(runs), combination_table(runs)]
    rows = [(name, str(value)) for name, value in settings.items()]
    tables.append(Table("Settings", "Those of the run.", ("setting", "value"), rows))
    return _written(folder / PAGE, f"Run {folder.name}", list(_notes(records)), tables, runs)


def compare(folders: Sequence[Path], destination: Path) -> str:
    """Write the page of several runs side by side.

    Args:
        folders: of the runs; each is called by its name, or, where names are alike, by its path.
        destination: the page, replaced as a whole.
    Returns:
        The tables, to print.
    Raises:
        ValueError: fewer than two runs, one twice, or a folder without metrics.
        OSError: the page could not be written.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ValueError(
            f"`runs` must name two or more different folders, got {[str(f) for f in folders]}"
        )
    alike = len({folder.name for folder in folders}) < len(folders)
    runs = {}
    for folder in folders:
        records = read_records(folder / "metrics.jsonl")
        if not records:
            raise ValueError(
                f"`runs`: {folder} holds no metrics.jsonl with a record; name the `output_dir` of "
                f"a run"
            )
        runs[str(folder) if alike else folder.name] = records
    tables = [table for table in (evaluation_table(runs), combination_table(runs)) if table.rows]
    notes = [] if has_pictures() else [NO_PICTURE]
    _written(destination, "Runs side by side", notes, tables, runs)
    return "\n\n".join(
        f"{table.title}: {table.text}\n\n{text_table(table.columns, table.rows)}"
        for table in tables
    )


def _written(
    page: Path,
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    runs: Mapping[str, Sequence[Record]],
) -> Path:
    text = html_page(title, notes, [table for table in tables if table.rows], curves(runs))
    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(page) as partial:
        partial.write_text(text, encoding="utf-8")
    return page


def _notes(records: Sequence[Record]) -> Iterator[str]:
    steps = [record for record in records if not is_evaluation(record)]
    skipped = int(steps[-1].get("raco/skipped_steps") or 0) if steps else 0
    last = steps[-1]["step"] if steps else 0
    yield f"{last} steps, of which {skipped} were skipped, as a loss or gradient was not finite."
    if not any(is_evaluation(record) for record in records):
        yield "There are no held-out pairs (`eval_data`), so nothing says what was learnt."
    if has_pictures():
        yield (
            "Pale lines are single steps, full ones means over a twentieth of them; circles are "
            "held-out pairs, with the 95 % interval of a share of so many pairs (Wilson). It "
            "covers the choice of held-out pairs, not the randomness of training: for that, train "
            "with several seeds."
        )
    else:
        yield NO_PICTURE


def evaluation_table(runs: Mapping[str, Sequence[Record]]) -> Table:
    """The first and the last evaluation of each run, by objective."""
    rows = []
    for run, records in runs.items():
        evaluations = [record for record in records if is_evaluation(record)]
        if not evaluations:
            continue
        first, last = evaluations[0], evaluations[-1]
        prefix = "eval_pairs/"
        for name in (n.removeprefix(prefix) for n in last if n.startswith(prefix)):
            pairs = int(last[prefix + name])
            accuracy = last.get(f"eval_rewards/accuracies/{name}")
            rows.append(
                (
                    run,
                    name,
                    str(pairs),
                    f"{_number(first, f'eval_loss/{name}')} → {_number(last, f'eval_loss/{name}')}",
                    share_with_interval(accuracy, pairs),
                    _number(last, f"eval_rewards/margins/{name}"),
                    share_with_interval(last.get(f"eval_logps/accuracies/{name}"), pairs),
                )
            )
    titles = ("run", "objective", "pairs", "loss", "accuracy of the reward", "its margin")
    return Table(
        "Held-out pairs",
        "First → last evaluation, then the last one. The implicit reward is beta times the change "
        "of the log-probability; likelihood ranks responses by the log-probability itself.",
        (*titles, "accuracy of the likelihood"),
        rows,
    )


def combination_table(runs: Mapping[str, Sequence[Record]]) -> Table:
    """How the gradients were combined, in means over the steps."""
    rows = []
    for run, records in runs.items():
        steps = [record for record in records if not is_evaluation(record)]
        for prefix, what in (
            ("raco/coefficient/", "coefficient"),
            ("raco/cosine/", "cosine in a step"),
            ("raco/clip_active", "share of steps that clipping changed"),
        ):
            names = dict.fromkeys(n for record in steps for n in record if n.startswith(prefix))
            for name in names:
                values = [r[name] for r in steps if r.get(name) is not None]
                if values:
                    of = name.removeprefix(prefix) or "-"
                    rows.append((run, what, of, f"{fmean(values):.3f}"))
    titles = ("run", "what", "objective", "mean")
    return Table("The combination", "Means over the steps.", titles, rows)


def _number(record: Record, name: str) -> str:
    value = record.get(name)
    return "-" if value is None else f"{value:.4f}"
