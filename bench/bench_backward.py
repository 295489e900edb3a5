"""Time of one DPO step with m objectives, in units of one plain DPO step of the same run.

    python -m bench.bench_backward --out runs/backward [--m 1 2 4 8] [--kinds full lora]

Before it is timed, one backward pass is compared with m of them on the same model. Rivals take
turns in one process; medians. Writes records.jsonl and prints the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

from bench.dpo_steps import STEPS, UNPREPARED, Problem, disagreement
from bench.records import Records
from bench.timing import interleaved

RIVALS = ("plain", "passes", "autograd", "one_backward", "gram_first", "gram_first, keep_dy")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    records = Records(Path(options.out), options.device)
    print(
        f"{'kind':<5} {'m':>2} {'error':>8}  " + "  ".join(f"{name:>20}" for name in options.rivals)
    )
    for kind in options.kinds:
        sizes = {"layers": options.layers, "sequences": options.sequences, "tokens": options.tokens}
        of_kind = {**sizes, "device": device, "dtype": getattr(torch, options.dtype)}
        bare, prepared = (Problem(kind, **of_kind, prepared=p) for p in (False, True))
        for m in options.m:
            error = disagreement(prepared, m) if m > 1 else 0.0
            until = perf_counter() + options.seconds
            calls = {
                name: STEPS[name](bare if name in UNPREPARED else prepared, m)
                for name in options.rivals
            }
            times = interleaved(calls, device, until)
            unit = times["plain"].quantiles()[1]
            shown = []
            for name, taken in times.items():
                low, middle, high = taken.quantiles()
                params = {"kind": kind, "m": m, "dtype": options.dtype, **sizes}
                values = {"p20": low, "p50": middle, "p80": high, "rounds": len(taken.device)}
                records.add(
                    f"backward/{name}", params, unit="s", ratio=middle / unit, error=error, **values
                )
                shown.append(f"{middle / unit:5.2f} ({low / unit:.2f}-{high / unit:.2f})")
            print(
                f"{kind:<5} {m:>2} {error:>8.0e}  " + "  ".join(f"{s:>20}" for s in shown),
                flush=True,
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="time of one DPO step with m objectives")
    parser.add_argument("--out", required=True, help="folder of records.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--m", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kind and m")
    return parser


if __name__ == "__main__":
    main()
