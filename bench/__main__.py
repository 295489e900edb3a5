"""Run parts of the benchmarks, in the order given: `python -m bench PART... --out DIR`.

Parts: tests (what is timed must pass them first), ceilings (the machine's), and the suites.
Records go to DIR/report.json as they are made; `python -m bench.records DIR` prints their table,
`python -m bench.report` runs everything and writes a page. Run from the root of a checkout.
"""

from argparse import ArgumentParser

from bench.harness.parts import add_options, run_parts
from raco_fast.settings.paths import expanded


def main() -> None:
    parser = ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--out", type=expanded, required=True, help="folder of the records")
    add_options(parser)
    run_parts(parser.parse_args())


if __name__ == "__main__":
    main()
