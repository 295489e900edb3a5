"""The study: warm up a model per seed, align it by every rule and weight vector, judge, report.

Jobs run in worker processes of one thread each. The results are the same for any number of
workers; only the time changes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from raco_fast.demo.report import write_reports
from raco_fast.demo.results import Aligned, WarmStart
from raco_fast.dual import RULES, check_c, check_rule

WEIGHTLESS_RULE = "mgda"
"""The rule that ignores the weights: it is run once a seed."""

Point: TypeAlias = "tuple[str, dict[str, float] | None]"
"""A rule and the weights it is run with."""

Result: TypeAlias = "tuple[int, WarmStart | Aligned]"


@dataclass(frozen=True)
class DemoConfig:
    """Settings of `raco-fast demo`; the defaults take three to five minutes on two cores.

    Args:
        output_dir: folder for report.md, pareto.png and metrics.jsonl.
        quick: a version of some seconds that shows the machinery works; its model is too small
            and its training too short for its scores to mean anything. Overrides the sizes below.
        seed: first seed.
        seeds: number of seeds; each has its own model, data and sampling.
        rules: the combination rules to compare.
        coverage_weights: one weight vector for each of these weights of coverage; what is left
            beside the weight of faithfulness goes to brevity.
        faithfulness_weight: weight of faithfulness in every weight vector.
        c: radius of the search around the weighted gradient, 0 <= c < 1.
        beta: strength of DPO's pull towards the warmed-up model.
        lr: learning rate of the alignment.
        steps: optimizer steps of one alignment.
        batch_size: preference pairs in a step.
        warm_up_steps: supervised steps before.
        warm_up_batch_size: summaries in a supervised step.
        warm_up_lr: peak learning rate of the warm-up.
        hidden_size: width of the model, a multiple of 8.
        layers: depth of the model.
        documents: held-out documents that every model summarises to be judged.
        workers: worker processes; 0 means one a core, at most 4; 1 runs in this process.
    """

    output_dir: str = "runs/demo"
    quick: bool = False
    seed: int = 0
    seeds: int = 3
    rules: tuple[str, ...] = RULES
    coverage_weights: tuple[float, ...] = (0.65, 0.4, 0.15)
    faithfulness_weight: float = 0.2
    c: float = 0.4
    beta: float = 0.1
    lr: float = 3e-4
    steps: int = 30
    batch_size: int = 8
    warm_up_steps: int = 260
    warm_up_batch_size: int = 16
    warm_up_lr: float = 1.5e-3
    hidden_size: int = 160
    layers: int = 3
    documents: int = 160
    workers: int = 0

    def __post_init__(self) -> None:
        """Reject settings the study cannot run with."""
        counts = ("seeds", "steps", "batch_size", "warm_up_steps", "warm_up_batch_size")
        for name in (*counts, "layers", "documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("beta", "lr", "warm_up_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"`workers` must be 0 (one a core) or more, got {self.workers}")
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(f"`hidden_size` must be a multiple of 8, got {self.hidden_size}")
        for rule in self.rules:
            check_rule(rule)
        check_c(self.c)
        self._check_weights()

    def _check_weights(self) -> None:
        for name in ("rules", "coverage_weights"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must hold different values, at least one, got {values}")
        rest = 1 - self.faithfulness_weight
        if not 0 <= rest <= 1:
            raise ValueError(
                f"`faithfulness_weight` must be in [0, 1], got {self.faithfulness_weight}"
            )
        for weight in self.coverage_weights:
            if not 0 <= weight <= rest + 1e-9:
                raise ValueError(
                    f"`coverage_weights` must lie in [0, {rest:g}], which is what "
                    f"`faithfulness_weight` leaves, got {weight}"
                )

    @property
    def weight_vectors(self) -> tuple[dict[str, float], ...]:
        """Objective -> weight, one mapping for each of `coverage_weights`."""
        return tuple(
            {
                "coverage": coverage,
                "brevity": max(0.0, round(1 - self.faithfulness_weight - coverage, 9)),
                "faithfulness": self.faithfulness_weight,
            }
            for coverage in self.coverage_weights
        )

    def sized(self) -> DemoConfig:
        """This configuration, with the sizes of the quick form if `quick` is set."""
        if not self.quick:
            return self
        return replace(
            self,
            seeds=2,
            coverage_weights=(0.6, 0.2),
            faithfulness_weight=0.2,
            steps=4,
            batch_size=4,
            warm_up_steps=25,
            warm_up_batch_size=8,
            hidden_size=32,
            layers=2,
            documents=12,
            workers=1,
        )


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
