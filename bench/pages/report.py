"""Everything in one command: run the suites, and write what they say as a page with plots.

    python -m bench.report --out DIR            run all parts, then write DIR/report.md
    python -m bench.report --out DIR --render   only write DIR/report.md, from DIR/report.json
    python -m bench.report --docs               write docs/performance.md from bench/results/,
                                                and the tables of docs/distributed.md

DIR gets report.json (one record a line, as it is measured), report.md and PNG plots. The tests of
what is timed run first; what fails them is not timed.
"""

from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from bench.harness.machine import ROOT
from bench.harness.parts import add_options, run_parts
from bench.harness.records import FILE, Record, Records, latest
from bench.pages import page, spread
from raco_fast.settings.paths import expanded

RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
PLOTS = DOCS / "performance"

INTRODUCTION = """\
# Performance

Written by `python -m bench.report --docs` from [bench/results](../bench/results); every number is
of a committed run and stands beside its rivals of the same run. `make bench` measures the same on
your machine, in less than ten minutes on two cores; [bench/README.md](../bench/README.md) says what
each rival is and how it is timed, [bench/LOG.md](../bench/LOG.md) what was tried and why a goal was
missed. Medians; `~` marks a figure whose p20 and p80 are more than 10 % apart. Multiples are of the
rival's time in the same turn; where something was measured twice, the later figure is shown.

What bounds it. The Gram, the combination and the update do next to no arithmetic, so their ceiling
is the copy bandwidth of the machine: *share* is the bytes that have to move at least, over the
time, over that bandwidth. (A copy writes what it never reads again; what only reads can exceed it.)
One backward pass for m objectives is bound by the matrix products of a plain step; what m adds is
a fold of the weight gradients for each objective, and the bytes of m gradients. A pair with P
tokens of prompt and responses of A and B is 2P + A + B tokens for a trainer that runs chosen and
rejected apart, and padding besides; on pair rows ([every token once](batching.md)) it is P + A + B,
so that no pair can be trained more than (2P + A + B) / (P + A + B) times as fast as packed
sequences are."""

NO_GPU = """\
## Not measured

**No figure of a GPU: nothing here has run on one yet.** `bench/gpu.sh` is written for it. Goals
that wait for it:"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m bench.report", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=expanded, help="folder of the records and the page")
    what.add_argument("--docs", action="store_true", help="write the pages from committed runs")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    add_options(parser)
    options = parser.parse_args(arguments)
    if options.docs:
        write_docs()
        return
    if not options.render:
        run_parts(options)
    print(f"bench: wrote {write(options.out)}")


def write(folder: Path) -> Path:
    """report.md and its plots from the records of a folder."""
    records = Records(folder, "cpu").read()
    if not records:
        raise SystemExit(f"`--out` {folder} holds no {FILE}; run without --render first")
    text = f"# Benchmarks\n\n{_run(records)}\n\n{_plotted(records, folder, folder)}"
    file = folder / "report.md"
    file.write_text(text.rstrip() + "\n", encoding="utf-8")
    return file


def write_docs() -> None:
    """docs/performance.md with its plots, and the tables of docs/distributed.md."""
    PLOTS.mkdir(exist_ok=True)
    for name, records in committed().items():
        (PLOTS / name).mkdir(exist_ok=True)
        _plotted(records, PLOTS / name, DOCS)
    (DOCS / "performance.md").write_text(performance(), encoding="utf-8")
    (DOCS / "distributed.md").write_text(distributed(), encoding="utf-8")


def performance() -> str:
    parts, runs = [INTRODUCTION], committed()
    for name, records in runs.items():
        plots = sorted((PLOTS / name).glob("*.png"))
        parts += [f"## {name}", _run(records), _images(plots, DOCS)]
    if not any("cuda" in page.devices(records) for records in runs.values()):
        parts += [NO_GPU, page.goals([], ["cuda"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def distributed() -> str:
    """docs/distributed.md with its tables from the newest run that has counted."""
    text = (DOCS / "distributed.md").read_text(encoding="utf-8")
    return spread.filled(text, spread.with_counts(committed().values()))


def committed() -> dict[str, list[Record]]:
    """Name of a results folder -> its records, the newest first."""
    folders = sorted((f.parent for f in RESULTS.glob(f"*/{FILE}")), reverse=True)
    return {folder.name: Records(folder, "cpu").read() for folder in folders}


def _run(records: Sequence[Record]) -> str:
    goals = page.goals(records, page.devices(records))
    losses = f"### Where a rival is faster\n\n{page.losses(records)}"
    return f"{page.body(records)}\n\n### Goals\n\n{goals}\n\n{losses}"


def _plotted(records: Sequence[Record], folder: Path, relative_to: Path) -> str:
    if find_spec("matplotlib") is None:
        return "No plots: matplotlib is missing; pip install 'raco-fast[plot]'."
    from bench.pages.plots import draw

    return _images(draw(latest(records), folder), relative_to)


def _images(files: Iterable[Path], relative_to: Path) -> str:
    return "\n\n".join(f"![{f.stem}]({f.relative_to(relative_to)})" for f in files)
