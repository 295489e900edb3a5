"""The commands: `raco-fast train`, `verify`, `conflict`, `sweep`, `pareto` and `demo`.

`train` also runs on several processes: `torchrun --nproc-per-node 8 $(which raco-fast) train ...`.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from raco_fast.settings.parsing import add_settings, made, new_parser, parsed

if TYPE_CHECKING:
    from raco_fast.dpo.run.config import TrainConfig

EXIT_NOT_EXACT = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# Commands that take a config file, which may stand without its flag.
_OF_A_FILE = ("train", "verify", "conflict", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit status.

    0 done, 1 `verify` found that one backward pass is not exact, 2 bad input, a run that diverged,
    a full disk, no more memory, another process of the run is gone, or a run of a sweep failed (a
    message on stderr says what and how to mend it), 130 stopped by Ctrl-C, SIGTERM, SIGUSR1 or
    SIGHUP.
    """
    with _stopped_by_signals():
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            print("raco-fast: stopped", file=sys.stderr)
            return EXIT_INTERRUPTED


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 are a Ctrl-C, so that a run says what is left of it.

    Only where they would end the process without a word, and in the main thread, which alone can
    handle signals.
    """
    taken = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) is signal.SIG_DFL:
                taken.append(number)
                signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else None
    if command in _OF_A_FILE and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments.insert(1, "--config")
    runs = {
        "train": _run_train,
        "verify": _run_verify,
        "conflict": _run_conflict,
        "sweep": _run_sweep,
        "pareto": _run_pareto,
        "demo": _run_demo,
    }
    try:
        parser = _parser(command)
        values = parsed(parser, arguments, _kind(command))
        return runs[values.subcommand](parser, values)
    except ArgumentError as error:
        about = f"raco-fast {command}" if command in runs else "raco-fast"
        print(f"raco-fast: {error}\nsee {about} --help", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (ValueError, OSError, MemoryError) as error:
        print(f"raco-fast: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _parser(command: str | None) -> ArgumentParser:
    """The parser, with the options of `command` alone: reading the others' types takes seconds."""
    about = "Align language models to several conflicting preferences."
    parser = new_parser(prog="raco-fast", description=about)
    commands = parser.add_subcommands(required=True)
    train = new_parser(
        usage="raco-fast train config.yaml [--resume] [--lr 2e-5] [any setting of the file]",
        description="Multi-objective DPO on preference pairs.",
    )
    resume = "go on from the newest checkpoint in output_dir"
    train.add_argument("--resume", action=ActionYesNo, default=False, help=resume)
    verify = new_parser(
        usage="raco-fast verify config.yaml [any setting of the file]",
        description="Compare every gradient mode with autograd on the model and data of a run.",
    )
    conflict = new_parser(
        usage="raco-fast conflict config.yaml [--pairs 256] [--out folder] [any setting]",
        description="Before training: which objectives conflict, and what a step would see of it.",
    )
    measured = "training pairs to measure"
    conflict.add_argument("--pairs", type=int, default=256, help=measured)
    out = "folder of conflict.json and conflict.png; by default output_dir/conflict"
    conflict.add_argument("--out", type=str, default=None, help=out)
    sweep = new_parser(
        usage="raco-fast sweep sweep.yaml [--jobs 4] [any setting of the file]",
        description="Training runs for every point of a grid; run it again to go on.",
    )
    pareto = new_parser(
        usage="raco-fast pareto FOLDER ... [--by '[c]'] [any setting]",
        description="Compare the fronts of finished runs.",
    )
    pareto.add_argument("runs", nargs="+", help="folders of finished runs or of sweeps")
    demo = new_parser(description="A miniature of the paper's study; needs no download.")
    demo.add_argument("--quick", action=ActionYesNo, default=False, help="a few seconds' version")
    kind = _kind(command)
    for name, of_run, what in (
        ("train", train, "align a model on preference data"),
        ("verify", verify, "are the gradients of this run exact?"),
        ("conflict", conflict, "what conflict is there, before training?"),
        ("sweep", sweep, "train with every combination of some settings"),
        ("pareto", pareto, "compare the fronts of finished runs"),
        ("demo", demo, "compare the rules on an embedded toy task"),
    ):
        if command == name and kind is not None:
            add_settings(of_run, kind, skip={"quick", "runs"})
        commands.add_subcommand(name, of_run, help=what)
    return parser


def _kind(command: str | None) -> type | None:
    """The dataclass of a command's settings."""
    if command in ("train", "verify", "conflict"):
        from raco_fast.dpo.run.config import TrainConfig

        return TrainConfig
    if command == "sweep":
        from raco_fast.studies.sweep_config import SweepConfig

        return SweepConfig
    if command == "pareto":
        from raco_fast.studies.pareto_config import ParetoConfig

        return ParetoConfig
    if command == "demo":
        from raco_fast.demo.config import DemoConfig

        return DemoConfig
    return None


def _run_train(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.config import TrainConfig
    from raco_fast.dpo.run.divergence import DivergedError
    from raco_fast.dpo.run.trainer import Interrupted, train

    first = _speaks()
    config = made(parser, values, TrainConfig)
    try:
        results = train(config, resume=values.train.resume)
    except Interrupted as stop:
        if first:
            print(f"raco-fast: {stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except DivergedError as error:
        if first:
            print(f"raco-fast: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"raco-fast: {_stopped_at_once(config)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    for name, value in results.items():
        if name.startswith("eval_rewards/accuracies/"):
            print(f"{name}  {math.nan if value is None else value:.3f}")
    if first:
        print(f"saved {config.folder / 'model'}; metrics in {config.folder / 'metrics.jsonl'}")
    return 0


def _speaks() -> bool:
    """Set up logging; whether this is the process that tells what all of a run have to tell.

    An error of its own each process prints itself.
    """
    from raco_fast.dpo.launch import launched

    launch = launched()
    first = launch is None or launch.rank == 0
    logging.basicConfig(format="raco-fast: %(message)s")
    logging.getLogger("raco_fast").setLevel(logging.INFO if first else logging.ERROR)
    return first


def _run_verify(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.config import TrainConfig
    from raco_fast.dpo.run.failures import memory_named, to_run_a_model
    from raco_fast.dpo.run.verification import verify_run
    from raco_fast.engine.tap import NotExactError

    _refuse_many("verify")
    config = made(parser, values, TrainConfig)
    try:
        with memory_named("the comparison", to_run_a_model(config)):
            found = verify_run(config)
    except NotExactError as error:
        print(f"raco-fast: not exact: {error}", file=sys.stderr)
        return EXIT_NOT_EXACT
    print(found)
    if found.wrong:
        print("raco-fast: not exact: differences of more than rounding", file=sys.stderr)
        return EXIT_NOT_EXACT
    print("exact: no difference is more than rounding")
    return 0


def _run_conflict(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.config import TrainConfig
    from raco_fast.dpo.run.conflict_report import report_conflict
    from raco_fast.dpo.run.failures import memory_named, to_run_a_model

    _refuse_many("conflict")
    _speaks()
    config = made(parser, values, TrainConfig)
    asked = values.conflict
    with memory_named("the measurement", to_run_a_model(config)):
        print(report_conflict(config, pairs=asked.pairs, out=asked.out))
    return 0


def _stopped_at_once(config: TrainConfig) -> str:
    """What is left of a run that was stopped outside of the training steps, or twice."""
    from raco_fast.dpo.run.checkpoint import latest

    found = latest(config.folder / "checkpoints")
    if found is None:
        return "stopped before any checkpoint was written; run the same command again"
    return f"stopped; {found} is the last checkpoint. Run the same command with --resume to go on"


def _run_sweep(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.studies.sweep import sweep, table
    from raco_fast.studies.sweep_config import SweepConfig

    _refuse_many("sweep")
    config = made(parser, values, SweepConfig)
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


def _run_pareto(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.studies.pareto import pareto
    from raco_fast.studies.pareto_config import ParetoConfig

    _refuse_many("pareto")
    config = made(parser, values, ParetoConfig)
    print(f"{pareto(config)}\n\nreport: {config.folder / 'report.html'}")
    return 0


def _run_demo(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.demo.config import DemoConfig
    from raco_fast.demo.study import run

    _refuse_many("demo")
    run(made(parser, values, DemoConfig))
    return 0


def _refuse_many(command: str) -> None:
    from raco_fast.dpo.launch import launched

    launch = launched()
    if launch is not None and launch.size > 1:
        raise ValueError(
            f"`{command}` runs in one process, but a launcher has started {launch.size}, which "
            f"would all do the same; start `raco-fast {command}` without torchrun"
        )


if __name__ == "__main__":
    sys.exit(main())
