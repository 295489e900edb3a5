"""Peak memory of one DPO step above weights and optimizer states, mode by mode.

    python -m bench.bench_memory --out runs/memory [--m 2 4] [--layers 30]

Each mode runs in a process of its own. On a CPU the peak is that of the resident set (VmHWM, reset
after the first step, so that caches and states are there); on CUDA torch's max_memory_allocated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.dpo_steps import STEPS, UNPREPARED, Problem
from bench.records import Records

MODES = [name for name in STEPS if name != "passes"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parser().parse_args(arguments)
    if options.one is not None:
        print(json.dumps(peak(options)))
        return
    records = Records(Path(options.out), options.device)
    for m in options.m:
        unit = None
        for name in MODES:
            command = [sys.executable, "-m", "bench.bench_memory", "--one", name, "--m", str(m)]
            for argument in ("out", "device", "dtype", "layers", "sequences", "tokens"):
                command += [f"--{argument}", str(getattr(options, argument))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            used = json.loads(done.stdout.splitlines()[-1])
            unit = used if unit is None else unit
            params = {"m": m, "layers": options.layers, "dtype": options.dtype}
            params |= {"sequences": options.sequences, "tokens": options.tokens}
            records.add(f"memory/{name}", params, unit="bytes", p50=used, ratio=used / unit)
            print(f"m={m} {name:<30} {used / 2**20:8.0f} MiB  {used / unit:5.2f}", flush=True)


def peak(options: argparse.Namespace) -> int:
    """Bytes at the peak of a second step above those before it."""
    device = torch.device(options.device)
    problem = Problem(
        "full",
        layers=options.layers,
        sequences=options.sequences,
        tokens=options.tokens,
        device=device,
        dtype=getattr(torch, options.dtype),
        prepared=options.one not in UNPREPARED,
    )
    step = STEPS[options.one](problem, options.m[0])
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="peak memory of one DPO step")
    parser.add_argument("--out", required=True, help="folder of records.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--m", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
