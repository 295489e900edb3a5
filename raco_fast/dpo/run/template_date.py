"""The day that chat templates print, fixed at the first run and kept.

Llama 3.2's template and others write today's date into every conversation. A run resumed after
midnight would go on with other tokens, and reference log-probabilities would be computed anew every
day.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.rendering import check_day
from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.together import by_first

_NAME = "template_date.txt"


def with_date(config: TrainConfig, processes: Processes) -> TrainConfig:
    """The config with the day its conversations have: `tokens.date`, one kept, or today.

    A day kept with the run comes before one kept in `cache_dir`, where runs before this one have
    their reference log-probabilities.

    Raises:
        ValueError: a file that holds no day, or one of the run to resume that is not `tokens.date`.
    """
    day = processes.say(by_first(processes, lambda: _day(config)))
    return replace(config, tokens=replace(config.tokens, date=day))


def keep_date(config: TrainConfig, day: str) -> None:
    """Keep the day of a run whose templates print it; in `cache_dir` the first one stays.

    Raises:
        OSError: it could not be written.
    """
    files = [config.folder / _NAME]
    cached = config.cache_folder / _NAME
    if config.tokens.date is None and not cached.exists():
        files.append(cached)
    for file in files:
        with atomic_file(file) as partial:
            partial.write_text(f"{day}\n", encoding="utf-8")


def _day(config: TrainConfig) -> str:
    wanted, of_run = config.tokens.date, _read(config.folder / _NAME)
    if wanted and of_run and wanted != of_run and latest(config.folder / "checkpoints"):
        raise ValueError(
            f"`tokens.date` must be {of_run!r}, the day that the run in {config.folder} began "
            f"with, got {wanted!r}; leave it out, or choose another `output_dir`"
        )
    return wanted or of_run or _read(config.cache_folder / _NAME) or date.today().isoformat()


def _read(file: Path) -> str | None:
    if not file.is_file():
        return None
    day = file.read_text(encoding="utf-8", errors="replace").strip()
    check_day(f"{file}", day, cure="write the day that its runs began with, or set `tokens.date`")
    return day
