"""Run parts of the benchmarks, in the order given: `python -m bench PART... --out DIR`.

Parts: tests (what is timed must pass them first), ceilings (the machine's), and the suites gram,
combine_adamw and step. Records go to DIR/records.jsonl as they are made; `python -m bench.records
DIR` prints their table. Run from the root of a checkout.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from time import perf_counter

import torch

from bench.cases import SIZES
from bench.records import Records
from bench.session import Session

PARTS = ("tests", "ceilings", "gram", "combine_adamw", "step")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=SIZES, help="default: gpu on cuda, cpu on cpu")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each part")
    parser.add_argument("--skip", nargs="*", default=(), help="rivals to leave out")
    args = parser.parse_args()
    device = torch.device(args.device)
    sizes = args.sizes or ("gpu" if args.device == "cuda" else "cpu")
    records = Records(args.out, args.device)
    for part in args.parts:
        started = perf_counter()
        session = Session(records, device, sizes, started + args.seconds, tuple(args.skip))
        module = import_module(f"bench.suites.{part}")
        module.run(session) if hasattr(module, "run") else session.measure(module)
        print(f"bench: {part} took {perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
