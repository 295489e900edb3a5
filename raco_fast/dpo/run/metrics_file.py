"""The JSON Lines file that metrics go to."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raco_fast.dpo.run.files import atomic_file, reported, sync


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; none where there is no file.

    A last line cut off by a crash or a full disk is left out.

    Raises:
        ValueError: any other line is not a record (file and line named).
    """
    return _records(path, torn_after=None)


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record is of an evaluation, not of a step."""
    return any(name.startswith("eval_") for name in record)


class MetricsFile:
    """One JSON object a line; non-finite numbers become null, as JSON has none.

    Args:
        path: the file.
        resumed_at: steps that a resumed run has completed; later records are dropped, since they
            are written again. None starts a new file.
        evaluated: whether the last of these steps has been evaluated; if not, a record of that is
            dropped too.
    Raises:
        ValueError: as `read_records`.
        OSError: the file could not be written.
    """

    def __init__(
        self, path: Path, *, resumed_at: int | None = None, evaluated: bool = True
    ) -> None:
        self.path = path
        kept = []
        if resumed_at is not None:
            kept = [
                record
                for record in _records(path, torn_after=resumed_at)
                if record["step"] < resumed_at
                or (record["step"] == resumed_at and (evaluated or not is_evaluation(record)))
            ]
        with atomic_file(path) as partial:
            partial.write_text("".join(f"{json.dumps(r)}\n" for r in kept), encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append one record; `record["step"]` counts completed optimizer steps.

        Returns:
            It as it stands in the file.
        Raises:
            OSError: it could not be written; the records before are whole.
        """
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with reported(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
        return clean

    def sync(self) -> None:
        """Force to disk what has been written, before a checkpoint that relies on it."""
        with reported(self.path):
            sync(self.path)


def _records(path: Path, torn_after: int | None) -> list[dict[str, Any]]:
    """As `read_records`, and after a record of more than `torn_after` steps any line may be torn.

    What was written after the last checkpoint was not forced to disk: a power cut can leave
    anything there, and a resumed run writes it again.
    """
    records: list[dict[str, Any]] = []
    torn: int | None = None
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            torn = torn or number
        elif torn is None:
            records.append(record)
        elif torn_after is None or record["step"] <= torn_after:
            raise ValueError(
                f"{path}:{torn}: a line must be a JSON record with a `step`, got another or a "
                f"damaged one; remove the line"
            )
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits
        return None
    known = isinstance(record, dict) and type(record.get("step")) is int
    return record if known else None
