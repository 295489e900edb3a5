"""The real run: SmolLM2-135M-Instruct with LoRA on real preferences, `linear` and `cagrad-clip`.

    python -m bench.real_run.run            # about an hour on 2 cores
    python -m bench.results_page            # docs/results.md from what it wrote

The two data sets run side by side, one thread each; the rules of a data set run one after the
other, so that the second finds the reference log-probabilities cached. An interrupted run goes on
where it stopped when the command is given again.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.real_run.fetch_model import fetch_model

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "real_run"
RULES = ("linear", "cagrad-clip")
DATA_SETS = ("nlg_ratings", "hh_rlhf")


def align(data_set: str, rules: Iterable[str] = RULES) -> None:
    """Train on one data set with each rule and keep the metrics under `RESULTS`."""
    for rule in rules:
        output = Path("runs/real_run") / f"{data_set}-{rule}"
        if not (output / "model").is_dir():
            command = [Path(sys.executable).with_name("raco-fast"), "train"]
            command += [HERE / f"{data_set}.yaml", "--rule", rule, "--output_dir", output]
            if any((output / "checkpoints").glob("step-*")):
                command.append("--resume")
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.with_suffix(".log").open("a") as log:
                threads = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, env=threads, stdout=log, stderr=log)
        shutil.copy(output / "metrics.jsonl", RESULTS / f"{data_set}-{rule}.jsonl")


def main() -> None:
    """Fetch the model, then run every data set with every rule."""
    fetch_model(Path("models/SmolLM2-135M-Instruct"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", HERE, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, code of commit {commit}\n"
    (RESULTS / "machine.txt").write_text(machine, encoding="utf-8")
    with ThreadPoolExecutor(len(DATA_SETS)) as lanes:
        list(lanes.map(align, DATA_SETS))


if __name__ == "__main__":
    main()
