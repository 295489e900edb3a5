"""Peak memory of one DPO step above weights and optimizer states, mode by mode.

    python -m bench.bench_memory --out runs/memory [--m 2 4] [--layers 30]

Each mode runs in a process of its own; the peak is that of a second step (`meter.py`), less what
there was before the first and less AdamW's two states. What a mode keeps between steps counts, what
malloc keeps does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

from bench.harness.dpo_problem import SHAPES, Problem, Setting
from bench.harness.meter import Meter
from bench.harness.records import Records
from bench.rivals.dpo_steps import STEPS, UNPREPARED

# glibc: map every larger block by itself, so that the resident set is what is allocated and not
# what malloc keeps for later. It costs time, which is not measured here.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MODES = tuple(name for name in STEPS if name not in ("passes", "torchjd"))


def measure(records: Records, setting: Setting, ms: Sequence[int], until: float) -> None:
    """Peak of every mode for each number of objectives, until that `perf_counter`."""
    for m in ms:
        unit = None
        for name in MODES:
            command = _command(setting, m, name)
            try:
                done = subprocess.run(
                    [sys.executable, *command],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    timeout=max(0.0, until - perf_counter()),
                    env={**os.environ, **_MALLOC},
                )
            except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as failure:
                records.add(f"memory/{name}", setting.params(m), failure=str(failure))
                continue
            used = json.loads(done.stdout.splitlines()[-1])
            unit = used if name == "plain" else unit
            records.add(
                f"memory/{name}",
                setting.params(m),
                unit="bytes",
                p50=used,
                ratio=None if unit is None else used / unit,
                reproduce=shlex.join(
                    [*(f"{k}={v}" for k, v in _MALLOC.items()), "python", *command]
                ),
            )
            print(f"m={m} {name:<30} {used / 2**20:8.0f} MiB", flush=True)


def _command(setting: Setting, m: int, name: str) -> list[str]:
    command = ["-m", "bench.bench_memory", "--one", name, "--m", str(m), "--out", "-"]
    return [*command, *setting.options()]


def peak(setting: Setting, name: str, m: int) -> int:
    """Bytes at the peak of a second step above weights and states."""
    problem = Problem(setting, prepared=name not in UNPREPARED)
    states = 2 * sum(p.numel() * p.element_size() for p in problem.params)
    meter = Meter(torch.device(setting.device), warmup=1)
    step = STEPS[name](problem, m)
    for _ in range(2):
        meter.begin()
        step()
        meter.end()
    return meter.peak() - states


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parser().parse_args(arguments)
    setting = Setting(
        kind=options.kind,
        shape=options.shape,
        layers=options.layers,
        sequences=options.sequences,
        tokens=options.tokens,
        dtype=options.dtype,
        device=options.device,
    )
    if options.one is not None:
        print(json.dumps(peak(setting, options.one, options.m[0])))
        return
    until = perf_counter() + options.seconds
    measure(Records(Path(options.out), options.device), setting, options.m, until)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="peak memory of one DPO step")
    parser.add_argument("--out", required=True, help="folder of report.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--kind", default="full", choices=["full", "lora"])
    parser.add_argument("--m", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1800.0, help="at most, for all")
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
