"""The study: warm up a model per seed, align it by every rule and weight vector, judge, report.

Jobs run in worker processes of one thread each. The results are the same for any number of
workers; only the time changes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.jobs import Aligned, WarmStart, align_job, warm_up_job
from raco_fast.demo.report import write_reports

WEIGHTLESS_RULE = "mgda"
"""The rule that ignores the weights: it is run once a seed."""

Point: TypeAlias = "tuple[str, dict[str, float] | None]"
"""A rule and the weights it is run with."""


def run(config: DemoConfig) -> Path:
    """Run the study and write its report.

    With more than one worker, call it from a module or under `if __name__ == "__main__":`, as
    worker processes import the calling script.

    Args:
        config: the settings.
    Returns:
        The folder that holds report.md, metrics.jsonl and, with matplotlib, pareto.png.
    Raises:
        OSError: the folder cannot be written.
    """
    config = config.sized()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    points = _points(config)
    workers = config.workers or min(4, os.cpu_count() or 1)
    print(
        f"demo: {config.seeds} seeds, each one warm-up and {len(points)} alignments, "
        f"{workers} worker(s); results go to {folder}"
    )
    with _executor(workers) as executor:
        starts, runs = _run_jobs(config, executor, points)
    write_reports(folder, config, starts, runs, seconds=time.perf_counter() - began)
    return folder


def _points(config: DemoConfig) -> list[Point]:
    """Every (rule, weights) to be run for each seed."""
    points: list[Point] = []
    for rule in config.rules:
        weights = [None] if rule == WEIGHTLESS_RULE else config.weight_vectors
        points += [(rule, vector) for vector in weights]
    return points


def _run_jobs(
    config: DemoConfig, executor: Executor, points: Sequence[Point]
) -> tuple[list[WarmStart], list[Aligned]]:
    """Run all jobs; the results come back in the order of seeds and points, not of completion."""
    starts: list[Future[WarmStart]] = [
        executor.submit(warm_up_job, config, config.seed + i) for i in range(config.seeds)
    ]
    runs: dict[int, list[Future[Aligned]]] = {}
    with tqdm(total=len(starts) * (1 + len(points)), unit="job", desc="demo") as bar:
        # Alignments of the first seed that is ready begin while others are warmed up.
        for done in as_completed(starts):
            start = done.result()
            tail = start.losses[-10:]
            bar.update()
            bar.write(
                f"seed {start.seed}: taught to summarise, loss per word {start.losses[0]:.2f} -> "
                f"{sum(tail) / len(tail):.2f}"
            )
            runs[start.seed] = [executor.submit(align_job, config, start, *p) for p in points]
        ordered = [run for seed in sorted(runs) for run in runs[seed]]
        for aligned in as_completed(ordered):
            aligned.result()  # raises at once what went wrong in the job
            bar.update()
    return [start.result() for start in starts], [run.result() for run in ordered]


@contextmanager
def _executor(workers: int) -> Iterator[Executor]:
    """Worker processes, or a thread of this process for one; stopped when the block fails."""
    if workers == 1:
        executor: Executor = ThreadPoolExecutor(1)
    else:
        # Spawned, not forked: torch's thread pool does not survive a fork. Ctrl-C reaches the
        # workers too; they end silently and the parent says what happened.
        executor = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
