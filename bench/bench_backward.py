"""Time of one DPO step with m objectives, in units of one plain DPO step of the same run.

    python -m bench.bench_backward --out runs/backward [--m 1 2 4 8] [--kinds full lora]

Before it is timed, one backward pass is compared with m of them on the same model; where they
differ, nothing is timed. Rivals take turns in one process; medians. Writes report.json and prints
the table.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from bench.harness import optional
from bench.harness.dpo_problem import SHAPES, Problem, Setting
from bench.harness.records import Records
from bench.harness.timing import interleaved
from bench.rivals.dpo_steps import STEPS, UNPREPARED, disagreement

RIVALS = tuple(name for name in STEPS if name != "gram_first, step_in_backward")
# Relative, of any parameter's gradients; beyond it one backward pass computes something else.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}


def measure(
    records: Records, setting: Setting, ms: Sequence[int], rivals: Sequence[str], seconds: float
) -> None:
    """Time the rivals for each number of objectives; `seconds` is for each of those."""
    if (failure := optional.obstacle(setting.kind)) is not None:
        records.add("backward/one_backward", setting.params(ms[0]), failure=failure)
        return
    for name in rivals:
        if (failure := optional.obstacle(name)) is not None:
            records.add(f"backward/{name}", setting.params(0), failure=failure)
    rivals = [name for name in rivals if optional.obstacle(name) is None]
    bare, prepared = (Problem(setting, prepared) for prepared in (False, True))
    for m in ms:
        error = disagreement(prepared, m) if m > 1 else 0.0
        if error > _TOLERANCE[setting.dtype]:
            failure = f"not timed: one backward pass and m of them differ by {error:.1g}"
            records.add("backward/one_backward", setting.params(m), failure=failure)
            continue
        until = perf_counter() + seconds
        calls = {name: STEPS[name](bare if name in UNPREPARED else prepared, m) for name in rivals}
        times = interleaved(calls, torch.device(setting.device), until)
        unit = times["plain"].quantiles()[1]
        for name, taken in times.items():
            low, middle, high = taken.quantiles()
            records.add(
                f"backward/{name}",
                setting.params(m),
                unit="s",
                p20=low,
                p50=middle,
                p80=high,
                rounds=len(taken.device),
                ratio=middle / unit,
                error=error,
                reproduce=_command(setting, m, rivals),
            )
            spread = f"({low / unit:.2f}-{high / unit:.2f})"
            print(f"{setting.kind:<5} m={m} {name:<30} {middle / unit:5.2f} {spread}", flush=True)


def _command(setting: Setting, m: int, rivals: Sequence[str]) -> str:
    command = ["python", "-m", "bench.bench_backward", "--out", "runs/backward"]
    command += ["--m", str(m), *setting.options(), "--rivals", *rivals]
    return shlex.join(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parser().parse_args(arguments)
    records = Records(Path(options.out), options.device)
    setting = Setting(
        shape=options.shape,
        layers=options.layers,
        sequences=options.sequences,
        tokens=options.tokens,
        dtype=options.dtype,
        device=options.device,
    )
    for kind in options.kind:
        measure(records, replace(setting, kind=kind), options.m, options.rivals, options.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="time of one DPO step with m objectives")
    parser.add_argument("--out", required=True, help="folder of report.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(_TOLERANCE))
    kinds = ("lora", "full")  # `--kinds`: as the first records say how to repeat them
    parser.add_argument("--kind", "--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--m", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kind and m")
    return parser


if __name__ == "__main__":
    main()
