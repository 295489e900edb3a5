"""Peak memory of one DPO step above weights and optimizer states, mode by mode.

    python -m bench.bench_memory --out runs/memory [--m 2 4] [--layers 30]

Each mode runs in a process of its own. On a CPU the peak is that of the resident set (VmHWM, reset
after the first step), on CUDA torch's max_memory_allocated; both less what there was before the
first step and less AdamW's two states. What a mode keeps between steps counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch

from bench.dpo_steps import STEPS, UNPREPARED, Problem, Setting
from bench.records import Records

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
                reproduce=" ".join(["python", *command]),
            )
            print(f"m={m} {name:<30} {used / 2**20:8.0f} MiB", flush=True)


def _command(setting: Setting, m: int, name: str) -> list[str]:
    command = ["-m", "bench.bench_memory", "--one", name, "--m", str(m), "--out", "-"]
    for option, value in asdict(setting).items():
        command += [f"--{option}", str(value)]
    return command


def peak(setting: Setting, name: str, m: int) -> int:
    """Bytes at the peak of a second step above weights and states."""
    device = torch.device(setting.device)
    problem = Problem(setting, prepared=name not in UNPREPARED)
    before = _now(device) + 2 * sum(p.numel() * p.element_size() for p in problem.params)
    step = STEPS[name](problem, m)
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    step()
    return _resident("VmHWM") - before


def _now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parser().parse_args(arguments)
    setting = Setting(
        kind=options.kind,
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
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1800.0, help="at most, for all")
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
