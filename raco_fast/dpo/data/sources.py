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

from raco_fast.dpo.data.field_use import FieldUse
from raco_fast.dpo.data.formats.context import tools, with_system
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.formats.registry import detect_format, format_named
from raco_fast.dpo.data.formats.turns import answer_parts
from raco_fast.dpo.data.labels import Labelling, pair_weights
from raco_fast.dpo.data.pairs import ConciseRule, PreferencePair, check_content
from raco_fast.dpo.data.rows import Row, RowError, read_rows
from raco_fast.dpo.data.values import is_empty, show

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
        on_bad: "error", or "skip" to leave out every row with something wrong in it (a line that
            is no JSON, a missing field, an unknown label, identical responses ...), with a warning
            that counts them. What is wrong with the file itself, a JSON list that is no JSON
            included, is an error either way, as is a file without one good row.
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
        OSError: a file that does not exist or cannot be read.
        RowError: something wrong with a row: an empty or half-written line, an unknown label, a
            missing field, an empty or identical response, an id used twice, two system prompts ...
            Names file, line, field, value, rule and cure; quotes no text.
        ValueError: something wrong with a file (not JSON Lines, damaged, in no known format) or
            with the settings of its source.
    """
    names = _checked_objectives(objectives, concise)
    files = [DataSource(s) if isinstance(s, str) else s for s in sources]
    if not files:
        raise ValueError("`sources` must name at least one file, got none; add a path")
    pairs: list[PreferencePair] = []
    seen: dict[str, str] = {}
    stems: Counter[str] = Counter()
    derived = None if concise is None else concise.objective
    for source in files:
        _check_source(source, names)
        stem = Path(source.path).name
        stems[stem] += 1
        prefix = stem if stems[stem] == 1 else f"{stem}#{stems[stem]}"
        labelling = Labelling(names, source.declared, source.columns, derived)
        pairs += _Reader(source, labelling, concise, prefix, seen).pairs()
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
    unlabelled = [name for name in source.columns if name not in (source.declared or names)]
    if source.declared and unlabelled:
        raise ValueError(
            f"`columns` of {source.path} must name objectives that the source labels, "
            f"{list(source.declared)}, got {unlabelled}; add them to `objective`"
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


@dataclass
class _LeftOut:
    """Rows of a source that cannot be used: raised at once, or counted where they are skipped."""

    policy: str
    count: int = 0
    reason: str = ""

    def add(self, error: RowError) -> None:
        if self.policy == "error":
            raise error
        self.count += 1
        self.reason = self.reason or str(error)


@dataclass(frozen=True)
class _Reader:
    """Reads one source of a run; `prefix` begins the ids it makes, `seen` are ids and places."""

    source: DataSource
    labelling: Labelling
    concise: ConciseRule | None
    prefix: str
    seen: dict[str, str]

    def pairs(self) -> Iterator[PreferencePair]:
        """The usable pairs; says at the end which rows and which fields were not used."""
        source, left_out, kept = self.source, _LeftOut(self.source.on_bad), 0
        form, rows = self._format(_readable(read_rows(source.path), left_out), left_out)
        use = FieldUse()
        for row in form.join(_noted(rows, form)):
            use = row.use
            try:
                pair = self._pair(row, form)
            except RowError as error:
                left_out.add(error)
                continue
            kept += 1
            yield pair
            if kept == source.limit:
                break
        if not kept:
            raise ValueError(
                f"{source.path}: a source must give at least one pair, got none "
                f"({left_out.count} left out, the first because: {left_out.reason}); "
                "mend the rows or remove the source"
            )
        self._report(left_out, use)

    def _format(self, rows: Iterator[Row], left_out: _LeftOut) -> tuple[Format, Iterator[Row]]:
        """The format, and all rows; the first rows that fit no format are left out."""
        if self.source.format != "auto":
            return format_named(self.source.format), rows
        unknown: ValueError | None = None
        for row in rows:
            try:
                form = detect_format(row)
            except ValueError as error:
                unknown = unknown or error
                if self.source.on_bad == "error":
                    break
                left_out.add(RowError(str(error)))
            else:
                return form, itertools.chain([row], rows)
        if unknown is not None:
            raise unknown
        raise ValueError(
            f"{self.source.path}: a source must hold a row that can be read, got none "
            f"({left_out.count} left out, the first because: {left_out.reason}); write it again"
        )

    def _pair(self, row: Row, form: Format) -> PreferencePair:
        prompt, a, b = form.content(row)
        prompt = with_system(row, prompt)
        (text_a, fields_a), (text_b, fields_b) = answer_parts(a), answer_parts(b)
        check_content(row, prompt, (text_a, fields_a), (text_b, fields_b))
        labels = self.labelling.of(row, form)
        if self.concise is not None and self.concise.objective not in labels:
            labels[self.concise.objective] = self.concise.label(text_a, text_b)
        columns = {n: self.labelling.column(n).removeprefix("-") for n in labels if labels[n]}
        weights, functions = pair_weights(row, columns), tools(row)
        return PreferencePair(
            self._id(row),  # last: the id of a row that is left out is free
            prompt,
            text_a,
            text_b,
            {n: labels.get(n, 0) for n in self.labelling.names},
            weights,
            functions,
            fields_a,
            fields_b,
        )

    def _id(self, row: Row) -> str:
        pair_id = _pair_id(row, self.prefix)
        if pair_id in self.seen:
            raise RowError(
                f"{row.where}: `id` must be unique over all sources, got {show(pair_id)} again "
                f"(first at {self.seen[pair_id]}); rename it, or remove the repeated row or file"
            )
        self.seen[pair_id] = row.where
        return pair_id

    def _report(self, left_out: _LeftOut, use: FieldUse) -> None:
        """Say what of a source was not used; raise where a setting named nothing in it."""
        path, unused = self.source.path, self.labelling.unused_columns()
        if unused:
            raise ValueError(
                f"{path}: `columns` must name fields of the file, got {unused}, of which no row "
                "has the field; correct the name, or leave it out"
            )
        if left_out.count:
            logger.warning(
                "%s: left out %d rows, the first because: %s",
                path,
                left_out.count,
                left_out.reason,
            )
        if use.unused():
            logger.warning("%s: not used (rows or turns that have them): %s", path, use.unused())


def _readable(rows: Iterator[Row | RowError], left_out: _LeftOut) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, RowError):
            left_out.add(row)
        else:
            yield row


def _noted(rows: Iterator[Row], form: Format) -> Iterator[Row]:
    """The rows, with a note of the fields that say something and are no labels."""
    for row in rows:
        for name, value in row.data.items():
            if not is_empty(value) and not form.is_label(name, value):
                row.use.rows_with[name] += 1
        yield row


def _pair_id(row: Row, prefix: str) -> str:
    given = row.data.get("id")
    if given is None:
        return f"{prefix}:{row.number}"
    if isinstance(given, bool) or not isinstance(given, (str, int)) or not str(given).strip():
        raise row.error(
            "id", "be a non-empty string or an integer", show(given), "write a unique name"
        )
    return str(given)
