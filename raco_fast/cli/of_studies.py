"""The commands that make or compare several runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionYesNo, ArgumentParser

from raco_fast.cli.command import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Command
from raco_fast.settings.parsing import made
from raco_fast.settings.paths import expanded

if TYPE_CHECKING:
    from raco_fast.demo.config import DemoConfig
    from raco_fast.studies.pareto_config import ParetoConfig
    from raco_fast.studies.sweep_config import SweepConfig


def _sweep_settings() -> type[SweepConfig]:
    from raco_fast.studies.sweep_config import SweepConfig

    return SweepConfig


def _sweep(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.studies.sweep import sweep, table

    config = made(parser, values, _sweep_settings())
    result = sweep(config)
    print(f"\n{table(result)}\n\nruns, with their numbers: {config.folder / 'runs.json'}")
    for run in result.failed:
        print(f"raco-fast: failed: {run.name}: {result.end_of(run).reason}", file=sys.stderr)
    if result.is_whole:
        return 0
    if result.failed and not result.stopped:
        return EXIT_BAD_INPUT
    print("raco-fast: stopped; run the same command again to go on", file=sys.stderr)
    return EXIT_INTERRUPTED


def _pareto_settings() -> type[ParetoConfig]:
    from raco_fast.studies.pareto_config import ParetoConfig

    return ParetoConfig


def _pareto_options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="folders of finished runs or of sweeps")


def _pareto(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.studies.pareto import pareto

    config = made(parser, values, _pareto_settings())
    print(f"{pareto(config)}\n\nreport: {config.folder / 'report.html'}")
    return 0


def _compare_options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="folders of two or more runs")
    page = "the HTML page that is written"
    parser.add_argument("--out", type=str, default="compare.html", help=page)


def _compare(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.run_report import compare

    asked = values.compare
    page = expanded(asked.out, "--out")
    print(f"{compare([expanded(run, 'runs') for run in asked.runs], page)}\n\npage: {page}")
    return 0


def _demo_settings() -> type[DemoConfig]:
    from raco_fast.demo.config import DemoConfig

    return DemoConfig


def _demo_options(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action=ActionYesNo, default=False, help="a few seconds' version")


def _demo(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.demo.study import run

    run(made(parser, values, _demo_settings()))
    return 0


OF_STUDIES = (
    Command(
        "sweep",
        "train with every combination of some settings",
        "Training runs for every point of a grid; run it again to go on.",
        _sweep,
        _sweep_settings,
        usage="raco-fast sweep sweep.yaml [--jobs 4] [any setting of the file]",
    ),
    Command(
        "pareto",
        "compare the fronts of finished runs",
        "Compare the fronts of finished runs.",
        _pareto,
        _pareto_settings,
        usage="raco-fast pareto FOLDER ... [--by '[c]'] [any setting]",
        options=_pareto_options,
        skip=frozenset({"runs"}),
        of_a_file=False,
    ),
    Command(
        "compare",
        "put runs side by side",
        "Curves, held-out scores and coefficients of runs, finished or not.",
        _compare,
        usage="raco-fast compare RUN RUN ... [--out compare.html]",
        options=_compare_options,
        of_a_file=False,
    ),
    Command(
        "demo",
        "compare the rules on an embedded toy task",
        "A miniature of the paper's study; needs no download.",
        _demo,
        _demo_settings,
        options=_demo_options,
        skip=frozenset({"quick"}),
        of_a_file=False,
    ),
)
