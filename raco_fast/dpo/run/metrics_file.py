"""The JSON Lines file that metrics go to, and TensorBoard's beside it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raco_fast.dpo.run.files import atomic_file


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; none where there is no file.

    A last line cut off by a crash or a full disk is left out.

    Raises:
        ValueError: any other line is no record (file and line named).
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        if (record := _record(line)) is not None:
            records.append(record)
        elif number < len(lines):
            raise ValueError(
                f"{path}:{number}: a line must be a JSON record with a `step`, got another or a "
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


class MetricsFile:
    """One JSON object a line; non-finite numbers become null, as JSON has none.

    Args:
        path: the file.
        resumed_at: steps that a resumed run has completed; later records are dropped, since they
            are written again. None starts a new file.
        tensorboard: also write event files to `tensorboard/` beside it.
    """

    def __init__(
        self, path: Path, *, resumed_at: int | None = None, tensorboard: bool = False
    ) -> None:
        self.path = path
        first = 0 if resumed_at is None else resumed_at + 1
        kept = [] if resumed_at is None else [r for r in read_records(path) if r["step"] < first]
        with atomic_file(path) as partial:
            partial.write_text("".join(f"{json.dumps(r)}\n" for r in kept), encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; `record["step"]` counts completed optimizer steps."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in clean.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, clean["step"])

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()
