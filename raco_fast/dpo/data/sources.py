"""Preference pairs from files: reading, strict labels, and labels derived from length.

    sources = [DataSource("helpful.jsonl", objective="helpful"), DataSource("pairs.jsonl.gz")]
    pairs = read_sources(sources, ["helpful", "harmless"])

Which labels a source must carry is decided per source:

- `objective` and `objectives` not given: every objective of the run, in every row. A missing field
  is an error.
- one of them given: exactly those that it names; the source's pairs are unlabelled (0) for the
  others. Files with one label (chosen / rejected) take exactly one.
- an objective derived from length (`ConciseRule`) needs no field anywhere.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.files import STDIN, files_of
from raco_fast.dpo.data.label_columns import as_columns
from raco_fast.dpo.data.labels import Labelling
from raco_fast.dpo.data.pairs import ConciseRule, PreferencePair
from raco_fast.dpo.data.reader import Reader


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
        The pairs of all sources, in order. A row without an id gets "<file name>:<row number>"; a
        pair of a row with several answers "/1-3" behind it, the numbers of the two.
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
        source.check(names)
        before = len(pairs)
        for path in files_of(source.path):
            left = None if source.limit is None else source.limit - (len(pairs) - before)
            if left == 0:
                break
            stem = "stdin" if path == STDIN else Path(path).name
            stems[stem] += 1
            prefix = stem if stems[stem] == 1 else f"{stem}#{stems[stem]}"
            labelling = Labelling(names, source.declared, as_columns(source.objectives), derived)
            file = replace(source, path=path, limit=left)
            pairs += Reader(file, labelling, concise, prefix, seen).pairs()
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
