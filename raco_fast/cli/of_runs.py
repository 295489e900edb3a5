"""The commands that take the config of a training run."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionYesNo, ArgumentParser

from raco_fast.cli.command import (
    EXIT_BAD_INPUT,
    EXIT_FOUND_WRONG,
    EXIT_INTERRUPTED,
    Command,
    speaks,
)
from raco_fast.settings.parsing import made

if TYPE_CHECKING:
    from raco_fast.dpo.run.config import TrainConfig


def _settings() -> type[TrainConfig]:
    from raco_fast.dpo.run.config import TrainConfig

    return TrainConfig


def _train_options(parser: ArgumentParser) -> None:
    resume = "go on from the newest checkpoint in output_dir"
    parser.add_argument("--resume", action=ActionYesNo, default=False, help=resume)
    overwrite = "remove the run that output_dir holds, once the new one is about to begin"
    parser.add_argument("--overwrite", action=ActionYesNo, default=False, help=overwrite)


def _train(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.divergence import DivergedError
    from raco_fast.dpo.run.trainer import Interrupted, train

    first = speaks()
    config, asked = made(parser, values, _settings()), values.train
    try:
        results = train(config, resume=asked.resume, overwrite=asked.overwrite)
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


def _stopped_at_once(config: TrainConfig) -> str:
    """What is left of a run that was stopped outside of the training steps, or twice."""
    from raco_fast.dpo.run.checkpoint import latest

    found = latest(config.folder / "checkpoints")
    if found is None:
        return "stopped before any checkpoint was written; run the same command again"
    return f"stopped; {found} is the last checkpoint. Run the same command with --resume to go on"


def _verify(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.failures import memory_named, to_run_a_model
    from raco_fast.dpo.run.verification import verify_run
    from raco_fast.engine.tap import NotExactError

    config = made(parser, values, _settings())
    try:
        with memory_named("the comparison", to_run_a_model(config)):
            found = verify_run(config)
    except NotExactError as error:
        print(f"raco-fast: not exact: {error}", file=sys.stderr)
        return EXIT_FOUND_WRONG
    print(found)
    if found.wrong:
        print("raco-fast: not exact: differences of more than rounding", file=sys.stderr)
        return EXIT_FOUND_WRONG
    print("exact: no difference is more than rounding")
    return 0


def _conflict_options(parser: ArgumentParser) -> None:
    measured = "training pairs to measure"
    parser.add_argument("--pairs", type=int, default=256, help=measured)
    out = "folder of conflict.json and conflict.png; by default output_dir/conflict"
    parser.add_argument("--out", type=str, default=None, help=out)


def _conflict(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.conflict_report import report_conflict
    from raco_fast.dpo.run.failures import memory_named, to_run_a_model

    speaks()
    config, asked = made(parser, values, _settings()), values.conflict
    with memory_named("the measurement", to_run_a_model(config)):
        print(report_conflict(config, pairs=asked.pairs, out=asked.out))
    return 0


def _eval_options(parser: ArgumentParser) -> None:
    of = "the trained model: a folder or a name of the hub; by default output_dir/model"
    parser.add_argument("--of", type=str, default=None, help=of)
    out = "the file of the metrics; by default output_dir/eval.json"
    parser.add_argument("--out", type=str, default=None, help=out)


def _eval(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.failures import memory_named, to_run_a_model
    from raco_fast.dpo.run.trained import report_trained

    speaks()
    config, asked = made(parser, values, _settings()), values.eval
    with memory_named("the evaluation", to_run_a_model(config)):
        print(report_trained(config, asked.of, asked.out))
    return 0


def _check(parser: ArgumentParser, values: Any) -> int:
    from raco_fast.dpo.run.check_report import check

    speaks()
    found = check(made(parser, values, _settings()))
    print("\n\n".join(found.paragraphs))
    for failure in found.failures:
        print(f"raco-fast: training would fail: {failure}", file=sys.stderr)
    return EXIT_FOUND_WRONG if found.failures else 0


OF_RUNS = (
    Command(
        "train",
        "align a model on preference data",
        "Multi-objective DPO on preference pairs.",
        _train,
        _settings,
        usage="raco-fast train config.yaml [--resume] [--lr 2e-5] [any setting of the file]",
        options=_train_options,
        processes=True,
    ),
    Command(
        "check",
        "what is in the data of a run, and what would fail?",
        "Read the data as a run would: labels, lengths, examples, and what would fail later.",
        _check,
        _settings,
        usage="raco-fast check config.yaml [any setting of the file]",
    ),
    Command(
        "eval",
        "judge a trained model on held-out pairs",
        "Held-out accuracy, margin and loss of a trained model, against the run's reference.",
        _eval,
        _settings,
        usage="raco-fast eval config.yaml [--of folder] [any setting of the file]",
        options=_eval_options,
    ),
    Command(
        "verify",
        "are the gradients of this run exact?",
        "Compare every gradient mode with autograd on the model and data of a run.",
        _verify,
        _settings,
        usage="raco-fast verify config.yaml [any setting of the file]",
    ),
    Command(
        "conflict",
        "what conflict is there, before training?",
        "Before training: which objectives conflict, and what a step would see of it.",
        _conflict,
        _settings,
        usage="raco-fast conflict config.yaml [--pairs 256] [--out folder] [any setting]",
        options=_conflict_options,
    ),
)
