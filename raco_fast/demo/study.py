"""The study: warm up a model per seed, align it by every rule and weight vector, judge, report.

Jobs run in worker processes of one thread each. The results are the same for any number of
workers; only the time changes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.report import write_reports
from raco_fast.demo.results import Aligned, WarmStart
from raco_fast.solver.registry import RuleLike

WEIGHTLESS_RULE = "mgda"
"""The rule that ignores the weights: it is run once a seed."""

Point: TypeAlias = "tuple[RuleLike, dict[str, float] | None]"
"""A rule and the weights it is run with."""

Result: TypeAlias = "tuple[int, WarmStart | Aligned]"


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
    seeds = range(config.seed, config.seed + config.seeds)
    workers = config.workers or min(4, os.cpu_count() or 1)
    print(
        f"demo: {config.seeds} seeds, each one warm-up and {len(points)} alignments, "
        f"{workers} worker(s); results go to {folder}"
    )
    with _executor(workers) as executor:
        starts, runs = _run_jobs(config, executor, points, seeds)
    print(
        f"aligned {len(runs)} models in {sum(r.seconds for r in runs):.0f} s of work; "
        f"{time.perf_counter() - began:.0f} s since the start"
    )
    write_reports(folder, config, starts, runs, seconds=time.perf_counter() - began)
    return folder


def _points(config: DemoConfig) -> list[Point]:
    """Every (rule, weights) to be run for each seed."""
    points: list[Point] = []
    for rule in config.rules:
        if rule == WEIGHTLESS_RULE:
            points.append((rule, None))
        else:
            points += [(rule, weights) for weights in config.weight_vectors]
    return points


def _run_jobs(
    config: DemoConfig, executor: ProcessPoolExecutor | None, points: list[Point], seeds: range
) -> tuple[list[WarmStart], list[Aligned]]:
    """Run all jobs; the results come back in the order of seeds and points, not of completion."""
    starts: dict[int, WarmStart] = {}
    runs: dict[tuple[int, int], Aligned] = {}
    if executor is None:
        results = _results_here(config, points, seeds)
    else:
        results = _results_of_pool(config, executor, points, seeds)
    with tqdm(total=len(seeds) * (1 + len(points)), unit="job", desc="demo") as bar:
        for place, result in results:
            bar.update()
            if isinstance(result, Aligned):
                runs[result.seed, place] = result
                continue
            starts[result.seed] = result
            tail = result.losses[-10:]
            bar.write(
                f"seed {result.seed}: taught to summarise in {result.seconds:.0f} s, loss per word "
                f"{result.losses[0]:.2f} -> {sum(tail) / len(tail):.2f}"
            )
    return [starts[seed] for seed in seeds], [runs[key] for key in sorted(runs)]


def _results_here(config: DemoConfig, points: list[Point], seeds: range) -> Iterator[Result]:
    """The results one after another, each with its place among `points` (-1 for a warm-up)."""
    # Imported here, so that reading the configuration (`raco-fast --help`) needs no transformers.
    from raco_fast.demo.jobs import align_job, warm_up_job

    for seed in seeds:
        start = warm_up_job(config, seed)
        yield -1, start
        for place, (rule, weights) in enumerate(points):
            yield place, align_job(config, start, rule, weights)


def _results_of_pool(
    config: DemoConfig, executor: ProcessPoolExecutor, points: list[Point], seeds: range
) -> Iterator[Result]:
    """As `_results_here`, in the order of completion; a seed's alignments wait for its warm-up."""
    from raco_fast.demo.jobs import align_job, warm_up_job

    places: dict[Future[Any], int] = {
        executor.submit(warm_up_job, config, seed): -1 for seed in seeds
    }
    while places:
        done, _ = wait(places, return_when=FIRST_COMPLETED)
        for future in done:
            place, result = places.pop(future), future.result()
            yield place, result
            if isinstance(result, WarmStart):
                for i, (rule, weights) in enumerate(points):
                    places[executor.submit(align_job, config, result, rule, weights)] = i


@contextmanager
def _executor(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of worker processes, or None for one worker; stops them when the block fails."""
    if workers == 1:
        yield None
        return
    # Spawned, not forked: torch's thread pool does not survive a fork.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_let_interrupts_end_the_worker
    )
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _let_interrupts_end_the_worker() -> None:
    """Ctrl-C reaches the workers too; they end silently and the parent says what happened."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
