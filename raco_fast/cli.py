"""`raco-fast train config.yaml --lr 2e-5` and `raco-fast demo`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit status.

    0 done, 2 bad input (one line on stderr says what and how to mend it), 130 stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) > 1 and arguments[0] == "train" and not arguments[1].startswith("-"):
        arguments.insert(1, "--config")  # the config file may stand without its flag
    parser = _parser()
    values = parser.parse_args(arguments)
    try:
        run = _run_train if values.subcommand == "train" else _run_demo
        return run(parser, values)
    except (ValueError, OSError) as error:
        print(f"raco-fast: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("raco-fast: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> ArgumentParser:
    from jsonargparse import ActionYesNo, ArgumentParser

    from raco_fast.demo.study import DemoConfig
    from raco_fast.dpo.config import TrainConfig

    parser = ArgumentParser(
        prog="raco-fast", description="Align language models to several conflicting preferences."
    )
    commands = parser.add_subcommands(required=True)
    train = ArgumentParser(description="Multi-objective DPO: raco-fast train config.yaml --lr 2e-5")
    train.add_argument("--config", action="config", help="YAML file of settings")
    train.add_argument(
        "--resume",
        action=ActionYesNo,
        default=False,
        help="go on from the newest checkpoint in output_dir",
    )
    train.add_class_arguments(TrainConfig)
    commands.add_subcommand("train", train, help="align a model on preference data")
    demo = ArgumentParser(description="A miniature of the paper's study; needs no download.")
    demo.add_argument("--quick", action=ActionYesNo, default=False, help="a few seconds' version")
    demo.add_class_arguments(DemoConfig, skip={"quick"})
    commands.add_subcommand("demo", demo, help="compare the rules on an embedded toy task")
    return parser


def _run_train(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.config import TrainConfig
    from raco_fast.dpo.trainer import Interrupted, train

    options = parser.instantiate(values).train
    config = TrainConfig(**_fields_of(TrainConfig, options))
    try:
        results = train(config, resume=options.resume)
    except Interrupted as stop:
        print(f"raco-fast: {stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    for name, value in results.items():
        if name.startswith("eval_rewards/accuracies/"):
            print(f"{name}  {value:.3f}")
    print(f"saved {config.folder / 'model'}; metrics in {config.folder / 'metrics.jsonl'}")
    return 0


def _run_demo(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.demo.study import DemoConfig, run

    run(DemoConfig(**_fields_of(DemoConfig, parser.instantiate(values).demo)))
    return 0


def _fields_of(config_class: Any, options: Any) -> dict[str, Any]:
    """The parsed options that are fields of a configuration class."""
    return {field.name: options[field.name] for field in dataclasses.fields(config_class)}
