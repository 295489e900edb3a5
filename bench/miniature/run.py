"""Run the miniature study, or go on with it: `python -m bench.miniature.run [CELL...]`.

Every job is a seed of a method in a cell. Its records are appended to bench/results/miniature/ as
soon as it is done, so that an interrupted study goes on where it stopped; warmed-up models wait in
runs/miniature/. A result depends on its cell and seed alone, not on the number of workers.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import platform
import subprocess
from argparse import ArgumentParser
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from bench.miniature.cells import START, Cell, jobs, read_cells, warm_up_config
from raco_fast.demo.config import DemoConfig
from raco_fast.demo.jobs import Judged, WarmStart, align_job, warm_up_job, with_pairs_of
from raco_fast.dpo.run.files import atomic_file

RESULTS = Path(__file__).resolve().parent.parent / "results" / "miniature"
_STARTS = Path("runs/miniature")
_KEPT = ("raco/cosine/", "raco/cosine_unbiased/", "raco/coefficient/", "raco/grad_norm/")
_KEPT += ("raco/clip_active", "raco/shrinkage", "raco/skipped_steps")
"""The metrics whose means over the steps are kept."""


def warmed_up(config: DemoConfig, seed: int) -> WarmStart:
    """The warmed-up model of a seed, from the folder of those that are there or trained now."""
    path = _STARTS / f"start-{seed}.pickle"
    if not path.exists():
        start = warm_up_job(config, seed)
        with atomic_file(path) as partial:
            partial.write_bytes(pickle.dumps(start))
    return pickle.loads(path.read_bytes())


def align_seed(
    warm: DemoConfig, cell: Cell, seed: int, rule: str, gram: str
) -> list[dict[str, Any]]:
    """One method of a cell at every weight vector: a record each, and one of the start."""
    start = with_pairs_of(cell.config, warmed_up(warm, seed))
    scores = {name: start.judged.scores[name] for name in cell.config.names}
    records = [{"seed": seed, "rule": START, "gram": None, "weights": None, "scores": scores}]
    for point in cell.points(rule, gram):
        records.append(_record(align_job(cell.config, start, *point)))
    return [{"cell": cell.name, "method": [rule, gram], **record} for record in records]


def _record(judged: Judged) -> dict[str, Any]:
    """Scores and what is kept of the steps: means over those with a number, and the last cosine."""
    names = [name for name in judged.steps[0] if name.startswith(_KEPT)]
    means = {}
    for name in names:
        finite = [step[name] for step in judged.steps if math.isfinite(step[name])]
        means[name] = round(fmean(finite), 6) if finite else None
    last = {
        name: round(judged.steps[-1][name], 6)
        for name in names
        if name.startswith("raco/cosine_unbiased/") and math.isfinite(judged.steps[-1][name])
    }
    return {
        "seed": judged.seed,
        "rule": judged.rule,
        "gram": judged.gram,
        "weights": judged.weights,
        "scores": judged.scores,
        "means": means,
        "last": last,
    }


def done_already(cell: Cell) -> set[tuple[int, str, str]]:
    """(seed, rule, Gram matrix) of the jobs whose records are there."""
    path = RESULTS / f"{cell.name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(record["seed"], *record["method"]) for record in map(json.loads, lines)}


def write(cell: Cell, records: list[dict[str, Any]]) -> None:
    """Add records to those of a cell, in an order that does not depend on who was first."""
    path = RESULTS / f"{cell.name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    place = {method: number for number, method in enumerate(cell.methods)}

    def order(line: str) -> tuple[int, int]:
        record = json.loads(line)
        return record["seed"], place[tuple(record["method"])]

    lines += [json.dumps(record) for record in records]
    with atomic_file(path) as partial:
        partial.write_text("\n".join(sorted(lines, key=order)) + "\n", encoding="utf-8")


def run(cells: list[Cell], workers: int) -> None:
    """Run what is missing of the cells."""
    warm, chosen = warm_up_config(read_cells()), list(jobs(cells))
    done = {cell.name: done_already(cell) for cell in cells}
    missing = [job for job in chosen if job[1:] not in done[job[0].name]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as executor:
        # Each seed's model once, before two jobs train it at the same time.
        list(executor.map(partial(warmed_up, warm), sorted({seed for _, seed, _, _ in missing})))
        running: dict[Future[list[dict[str, Any]]], Cell] = {
            executor.submit(align_seed, warm, *job): job[0] for job in missing
        }
        try:
            for future in tqdm(as_completed(running), total=len(running), unit="job"):
                write(running[future], future.result())
        finally:
            executor.shutdown(cancel_futures=True)


def _machine() -> str:
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    return f"{platform.machine()}, {os.cpu_count()} cores, code of commit {commit}"


def main() -> None:
    """Read the command line."""
    parser = ArgumentParser(prog="python -m bench.miniature.run", description=__doc__)
    parser.add_argument("cells", nargs="*", help="names of cells in study.yaml; all by default")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args()
    cells = {cell.name: cell for cell in read_cells()}
    if unknown := set(options.cells) - set(cells):
        parser.error(f"no such cell: {', '.join(sorted(unknown))}; there are {', '.join(cells)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    _STARTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "machine.txt").write_text(_machine() + "\n", encoding="utf-8")
    run([cells[name] for name in options.cells or cells], options.workers)


if __name__ == "__main__":
    main()
