"""The pairs of one file."""

from pathlib import Path

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.pairs import ConciseRule, PreferencePair
from raco_fast.dpo.data.sources import read_sources


def read_pairs(
    path: Path, objectives: list[str], concise: ConciseRule | None = None, limit: int | None = None
) -> list[PreferencePair]:
    return read_sources([DataSource(str(path), limit=limit)], objectives, concise=concise)
