"""The study: warm up a model per seed, align it by every rule and weight vector, judge, report.

Jobs run in worker processes of one thread each. The results are the same for any number of
workers; only the time changes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.jobs import Judged, WarmStart, align_job, warm_up_job
from raco_fast.demo.report import write_reports
from raco_fast.settings.paths import expanded


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
    folder = expanded(config.output_dir, "output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    workers = config.workers or min(4, os.cpu_count() or 1)
    print(
        f"demo: {config.seeds} seeds, each one warm-up and {len(config.points)} alignments, "
        f"{workers} worker(s); results go to {folder}"
    )
    executor = _executor(workers)
    try:
        results = _results(config, executor)
    finally:
        executor.shutdown(cancel_futures=True)
    write_reports(folder, config, results, seconds=time.perf_counter() - began)
    return folder


def _executor(workers: int) -> Executor:
    """Worker processes, or a thread of this process for one."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    # Spawned, not forked: torch's thread pool does not survive a fork. Ctrl-C reaches the workers
    # too: they end silently, and the parent says what happened.
    context, silently = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_DFL)
    return ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=silently)


def _results(config: DemoConfig, executor: Executor) -> list[Judged]:
    """Run all jobs; the results come in the order of seeds and points, not of completion."""
    starts: list[Future[WarmStart]] = [
        executor.submit(warm_up_job, config, config.seed + i) for i in range(config.seeds)
    ]
    aligned: dict[int, list[Future[Judged]]] = {}
    with tqdm(total=len(starts) * (1 + len(config.points)), unit="job", desc="demo") as bar:
        # A seed's alignments begin while others are still warmed up.
        for done in as_completed(starts):
            start = done.result()
            seed, losses = start.judged.seed, [step["loss"] for step in start.judged.steps]
            aligned[seed] = [executor.submit(align_job, config, start, *p) for p in config.points]
            bar.update()
            bar.write(
                f"seed {seed}: taught to summarise, loss per word {losses[0]:.2f} -> "
                f"{fmean(losses[-10:]):.2f}"
            )
        ordered = [future for seed in sorted(aligned) for future in aligned[seed]]
        for future in as_completed(ordered):
            future.result()  # raises at once what went wrong in the job
            bar.update()
    return [*(start.result().judged for start in starts), *(each.result() for each in ordered)]
