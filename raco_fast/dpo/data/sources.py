"""Preference pairs from files: reading, strict labels, and labels derived from length.

    sources = [DataSource("helpful.jsonl", objective="helpful"), DataSource("pairs.jsonl.gz")]
    pairs = read_sources(sources, ["helpful", "harmless"])

Which labels a source must carry is decided per source:

- `objective` not given: every objective of the run, in every row. A missing field is an error.
- `objective` given (one name or several): exactly those; the source's pairs are unlabelled (0)
  for the others. Files without a label field (chosen / rejected) take exactly one.
- an objective derived from length (`ConciseRule`) needs no field anywhere.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.formats.registry import detect_format, format_named
from raco_fast.dpo.data.pairs import (
    ConciseRule,
    PreferencePair,
    check_content,
    pair_weights,
    soft_label,
)
from raco_fast.dpo.data.rows import Row, RowError, read_rows, show

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSource:
    """One file of a run.

    Args:
        path: JSON Lines or a JSON list, gzip or not.
        objective: the objective(s) this file labels; None: every objective of the run.
        format: a name in `raco_fast.dpo.data.formats.registry.FORMATS`, or "auto": by the fields
            of the first row.
        limit: read only the first `limit` usable pairs.
        columns: objective -> the field that labels it, where the names differ; a leading "-"
            turns the sign ({"concise": "-verbosity"}).
        on_bad: "error", or "skip" to leave out rows that cannot be a pair (empty or identical
            responses, several turns in one, no partner with the same prompt), with a warning that
            counts them. Unreadable lines and unknown labels are errors either way.
    """

    path: str
    objective: str | list[str] | None = None
    format: str = "auto"
    limit: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    on_bad: Literal["error", "skip"] = "error"

    @property
    def declared(self) -> tuple[str, ...] | None:
        """The objectives this file is said to label, or None for all of the run."""
        if self.objective is None:
            return None
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)


def read_sources(
    sources: Sequence[DataSource | str],
    objectives: Sequence[str],
    *,
    concise: ConciseRule | None = None,
) -> list[PreferencePair]:
    """Read the pairs of several files, each labelling its own objectives.

    Args:
        sources: files, in order; a plain string is a `DataSource` with that path.
        objectives: names of the run; every pair gets a label for each.
        concise: derives one objective from length where the data has no label for it.
    Returns:
        The pairs of all sources, in order. A row without an id gets "<file name>:<row number>".
    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: an empty or half-written line, an unknown label, a missing label field, an
            empty or identical response, a prompt that does not end with a user turn, or an id
            used twice. Names file, line, field, value, rule and cure; quotes no text.
    """
    names = _checked_objectives(objectives, concise)
    files = [DataSource(s) if isinstance(s, str) else s for s in sources]
    if not files:
        raise ValueError("`sources` must name at least one file, got none; add a path")
    pairs: list[PreferencePair] = []
    seen: dict[str, str] = {}
    stems: Counter[str] = Counter()
    for source in files:
        _check_source(source, names)
        stem = Path(source.path).name
        stems[stem] += 1
        prefix = stem if stems[stem] == 1 else f"{stem}#{stems[stem]}"
        for where, pair in _Reader(source, names, concise, prefix).pairs():
            if pair.id in seen:
                raise ValueError(
                    f"{where}: `id` must be unique over all sources, got {show(pair.id)} again "
                    f"(first at {seen[pair.id]}); rename it, or remove the repeated row or file"
                )
            seen[pair.id] = where
            pairs.append(pair)
    return pairs


def _checked_objectives(objectives: Sequence[str], concise: ConciseRule | None) -> tuple[str, ...]:
    if isinstance(objectives, str):
        raise TypeError(
            f"`objectives` must be a sequence of names, got the string {objectives!r}; "
            f"write [{objectives!r}]"
        )
    names = tuple(objectives)
    if not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError(
            f"`objectives` must hold at least one name and no blank one, got {list(names)}; "
            "name each objective as in `weights`"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"`objectives` must be distinct, got {list(names)}; remove the repetition")
    if concise is not None and concise.objective not in names:
        raise ValueError(
            f"`concise.objective` must be one of the objectives {list(names)}, "
            f"got {concise.objective!r}; add it or leave `concise` out"
        )
    return names


def _check_source(source: DataSource, names: tuple[str, ...]) -> None:
    given = {"objective": source.declared or (), "columns": tuple(source.columns)}
    for what, used in given.items():
        unknown = [name for name in used if name not in names]
        if unknown:
            raise ValueError(
                f"`{what}` of {source.path} must name objectives of the run {list(names)}, "
                f"got {unknown}; add them to the weights or correct the name"
            )
    if source.declared == ():
        raise ValueError(
            f"`objective` of {source.path} must name at least one objective, got []; leave it out "
            "when the file labels all of them"
        )
    if source.limit is not None and source.limit < 1:
        raise ValueError(
            f"`limit` of {source.path} must be at least 1, got {source.limit}; leave it out to "
            "read the whole file"
        )
    if source.on_bad not in ("error", "skip"):
        raise ValueError(
            f"`on_bad` of {source.path} must be 'error' or 'skip', got {source.on_bad!r}"
        )


@dataclass(frozen=True)
class _Reader:
    """Reads one source of a run with the objectives `names`; `prefix` begins the ids it makes."""

    source: DataSource
    names: tuple[str, ...]
    concise: ConciseRule | None
    prefix: str

    def pairs(self) -> Iterator[tuple[str, PreferencePair]]:
        """The usable pairs with their places."""
        source = self.source
        rows = read_rows(source.path)
        first = next(rows)
        form = detect_format(first) if source.format == "auto" else format_named(source.format)
        kept, skipped, reason = 0, 0, ""
        for row in form.join(itertools.chain([first], rows)):
            try:
                pair = self._pair(row, form)
            except RowError as error:
                if source.on_bad == "error":
                    raise
                skipped += 1
                reason = reason or str(error)
                continue
            kept += 1
            yield row.where, pair
            if kept == source.limit:
                break
        if skipped:
            logger.warning(
                "%s: left out %d rows, the first because: %s", source.path, skipped, reason
            )
        if not kept:
            raise ValueError(
                f"{source.path}: a source must give at least one pair, got none ({skipped} left "
                f"out, the first because: {reason}); mend the rows or remove the source"
            )

    def _pair(self, row: Row, form: Format) -> PreferencePair:
        prompt, response_a, response_b = form.content(row)
        check_content(row, prompt, response_a, response_b)
        labels = self._labels(row, form)
        if self.concise is not None and self.concise.objective not in labels:
            labels[self.concise.objective] = self.concise.label(response_a, response_b)
        columns = {n: self._column(n).removeprefix("-") for n in labels if labels[n]}
        return PreferencePair(
            _pair_id(row, self.prefix),
            prompt,
            response_a,
            response_b,
            {n: labels.get(n, 0) for n in self.names},
            pair_weights(row, columns),
        )

    def _column(self, objective: str) -> str:
        return self.source.columns.get(objective, objective)

    def _labels(self, row: Row, form: Format) -> dict[str, float]:
        """The labels this row carries; an objective the source is not said to label is left out."""
        if form.label is None:
            return self._label_of_preferred(row, form)
        labels: dict[str, float] = {}
        for name in self.source.declared or self.names:
            column = self._column(name)
            field = column.removeprefix("-")
            hard, soft = form.label(row, field), soft_label(row, field)
            if hard is not None and soft is not None:
                raise row.error(
                    f"preference_probabilities.{field}",
                    "stand for an objective without a hard label",
                    f"the label {hard} beside it",
                    "remove one of the two",
                )
            label = soft if hard is None else hard
            if label is not None:
                labels[name] = -label if column.startswith("-") else label
            elif self.concise is None or name != self.concise.objective:
                raise ValueError(
                    f"{row.where}: a row must label every objective of its source, got no field "
                    f"for {name!r} ({form.name!r} format, fields {form.fields(row)}); write 0 "
                    f"where a pair is not labelled, set `objective` to the ones this file labels, "
                    f"or map the name with `columns`"
                )
        return labels

    def _label_of_preferred(self, row: Row, form: Format) -> dict[str, float]:
        """The one label of a format without label fields, whose response a is the preferred one."""
        if self.source.columns:
            raise ValueError(
                f"{row.where}: `columns` must be empty for a {form.name!r} file, which has no "
                f"label fields, got {self.source.columns}; use `objective`"
            )
        derived = None if self.concise is None else self.concise.objective
        own = self.source.declared or tuple(n for n in self.names if n != derived)
        if len(own) != 1:
            raise ValueError(
                f"{row.where}: `objective` must name the one objective that a {form.name!r} file "
                f"labels, got {list(own)}; add e.g. `objective: {own[0] if own else self.names[0]}`"
                " to the source"
            )
        soft = soft_label(row, own[0])
        if soft is None and "preference_probabilities" in row.data:
            raise row.error(
                "preference_probabilities", f"hold {own[0]!r}", "another", "correct the name"
            )
        return {own[0]: soft or 1}


def _pair_id(row: Row, prefix: str) -> str:
    given = row.data.get("id")
    if given is None:
        return f"{prefix}:{row.number}"
    if isinstance(given, bool) or not isinstance(given, (str, int)) or not str(given).strip():
        raise row.error(
            "id", "be a non-empty string or an integer", show(given), "write a unique name"
        )
    return str(given)
