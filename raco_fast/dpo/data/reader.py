"""The pairs of one source: from rows to prompt, answers, labels and weights."""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.field_use import FieldUse
from raco_fast.dpo.data.files import read_rows
from raco_fast.dpo.data.formats.context import tools, with_system
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.formats.registry import find_format, format_named, unknown_format
from raco_fast.dpo.data.formats.turns import answer_parts
from raco_fast.dpo.data.labels import Labelling, pair_weights
from raco_fast.dpo.data.not_used import NotUsed
from raco_fast.dpo.data.pairs import ConciseRule, PreferencePair, SameAnswersError, check_content
from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.dpo.data.values import is_empty, show

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reader:
    """Reads one source of a run; `prefix` begins the ids it makes, `seen` are ids and places."""

    source: DataSource
    labelling: Labelling
    concise: ConciseRule | None
    prefix: str
    seen: dict[str, str]

    def pairs(self) -> Iterator[PreferencePair]:
        """The usable pairs; says at the end which rows and which fields were not used.

        Raises:
            OSError, ValueError: as `read_sources`.
        """
        source, left_out, kept = self.source, NotUsed(self.source.on_bad), 0
        form, rows = self._format(_readable(read_rows(source), left_out), left_out)
        use = FieldUse()
        for of_row in _of_each_row(form.join(_noted(rows, form))):
            use = of_row[0].use
            found = self._of_row(of_row, form, left_out)
            for pair in found[: None if source.limit is None else source.limit - kept]:
                kept += 1
                left_out.note_labels(pair)
                yield pair
            if kept == source.limit:
                break
        if not kept:
            raise ValueError(
                f"{source.path}: a source must give at least one pair, got none "
                f"({left_out.why()}); mend the rows or remove the source"
            )
        logger.info("%s: %d pairs, read as the format %r", source.path, kept, form.name)
        self._report(left_out, use)

    def _format(self, rows: Iterator[Row], left_out: NotUsed) -> tuple[Format, Iterator[Row]]:
        """The format, and all rows; the first rows that fit no format are left out."""
        if self.source.format != "auto":
            return format_named(self.source.format), rows
        unknown: ValueError | None = None
        for row in rows:
            form = find_format(row.data.keys())
            if form is not None:
                return form, itertools.chain([row], rows)
            unknown = unknown or unknown_format(row)
            if self.source.on_bad == "error":
                break
            left_out.add(RowError(str(unknown)))
        if unknown is not None:
            raise unknown
        raise ValueError(
            f"{self.source.path}: a source must hold a row that can be read, got none "
            f"({left_out.why()}); write it again"
        )

    def _of_row(self, rows: list[Row], form: Format, left_out: NotUsed) -> list[PreferencePair]:
        """The pairs of a row, of which there are several where it has several answers."""
        pairs = []
        for row in rows:
            try:
                pair = self._pair(row, form)
            except RowError as error:
                if isinstance(error, SameAnswersError) and row.sides is not None:
                    left_out.same.add(row.where)
                else:
                    left_out.add(error)
                continue
            if row.sides is not None and not any(pair.preferences.values()):
                left_out.tied.add(row.where)
                continue
            left_out.note_contradiction(row, form.contradiction(row))
            pairs.append(pair)
        if self.source.pairs_per_row is None or len(pairs) <= self.source.pairs_per_row:
            return pairs
        drawn = {pair.id for pair in sorted(pairs, key=_hash)[: self.source.pairs_per_row]}
        return [pair for pair in pairs if pair.id in drawn]

    def _pair(self, row: Row, form: Format) -> PreferencePair:
        prompt, a, b = form.content(row)
        prompt = with_system(row, prompt)
        (text_a, fields_a), (text_b, fields_b) = answer_parts(a), answer_parts(b)
        check_content(row, prompt, (text_a, fields_a), (text_b, fields_b))
        labels = self.labelling.of(row, form)
        if self.concise is not None and self.concise.objective not in labels:
            labels[self.concise.objective] = self.concise.label(text_a, text_b)
        keys = {name: self.labelling.key(name) for name, label in labels.items() if label}
        weights, functions = pair_weights(row, keys), tools(row)
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

    def _report(self, left_out: NotUsed, use: FieldUse) -> None:
        """Say what of a source was not used; raise where a setting named nothing in it."""
        path, unused = self.source.path, self.labelling.unused_columns()
        if unused:
            raise ValueError(
                f"{path}: `objectives` must name fields of the file, got {unused}, of which no row "
                "has the field; correct the name, or leave it out"
            )
        asked = [name for name in self.labelling.names if name in self.labelling.found]
        left_out.report(path, asked)
        if use.unused():
            logger.warning("%s: not used (rows or turns that have them): %s", path, use.unused())


def _readable(rows: Iterator[Row | RowError], left_out: NotUsed) -> Iterator[Row]:
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


def _of_each_row(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of pairs by the row of the file that they come from, read no further than asked."""
    several: list[Row] = []
    for row in rows:
        if several and (row.sides is None or row.number != several[0].number):
            yield several
            several = []
        if row.sides is None:
            yield [row]
        else:
            several.append(row)
    if several:
        yield several


def _hash(pair: PreferencePair) -> bytes:
    return hashlib.sha256(pair.id.encode()).digest()


def _pair_id(row: Row, prefix: str) -> str:
    pair = "" if row.sides is None else f"/{row.sides[0] + 1}-{row.sides[1] + 1}"
    given = row.data.get("id")
    if given is None:
        return f"{prefix}:{row.number}{pair}"
    if isinstance(given, bool) or not isinstance(given, (str, int)) or not str(given).strip():
        raise row.error(
            "id", "be a non-empty string or an integer", show(given), "write a unique name"
        )
    return f"{given}{pair}"
