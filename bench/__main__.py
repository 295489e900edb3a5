"""Run parts of the benchmarks, in the order given: `python -m bench PART... --out DIR`.

Parts: tests (what is timed must pass them first), ceilings (the machine's), and the suites.
Records go to DIR/report.json as they are made; `python -m bench.records DIR` prints their table,
`python -m bench.report` runs everything and writes a page. Run from the root of a checkout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.harness.cases import SIZES
from bench.harness.parts import PARTS, default_sizes, run_part
from bench.harness.records import Records


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=SIZES, help="default: gpu on cuda, cpu on cpu")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each part")
    parser.add_argument("--skip", nargs="*", default=(), help="rivals to leave out")
    args = parser.parse_args()
    sizes = args.sizes or default_sizes(args.device)
    records = Records(args.out, args.device)
    for part in args.parts:
        run_part(part, records, args.device, sizes, args.seconds, args.skip)


if __name__ == "__main__":
    main()
