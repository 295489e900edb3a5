"""Whole DPO training steps of one contestant, in a process of its own; the last line is JSON.

    python -m bench.bench_train --contestant "raco cagrad-clip" --kind lora --m 2

bench/suites/train.py runs it for every contestant in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import torch

import raco_fast
from bench.harness.dpo_problem import SHAPES, FreshProblem, Setting
from bench.harness.meter import Meter

WARMUP = 2
"""Steps that do not count: the first has extra passes (`prepare` proves itself) and new memory."""

LR = 1e-5
"""Constant and without weight decay, for everyone."""


class Train(Protocol):
    """Trains for so many steps, each one metered."""

    def __call__(self, problem: FreshProblem, steps: int, *, meter: Meter) -> None: ...


def plain(problem: FreshProblem, steps: int, meter: Meter) -> None:
    """One objective: one loss, one backward pass, torch's fused AdamW."""
    optimizer = torch.optim.AdamW(problem.params, lr=LR, weight_decay=0.0, fused=True)
    for _ in range(steps):
        meter.begin()
        problem.losses(problem.scores(), 1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.end()


def raco(rule: str, m: int) -> Train:
    """m objectives in one backward pass and one step of `ClippedCAGradAdamW`."""

    def train(problem: FreshProblem, steps: int, meter: Meter) -> None:
        raco_fast.prepare(problem.model, strict=True)
        optimizer = raco_fast.ClippedCAGradAdamW(
            problem.params, lr=LR, weight_decay=0.0, weights=[1 / m] * m, rule=rule
        )
        for _ in range(steps):
            meter.begin()
            scores = problem.scores()
            optimizer.backward(problem.losses(scores, m), scores=scores)
            optimizer.step()
            optimizer.zero_grad()
            meter.end()
        assert optimizer.skipped_steps == 0

    return train


CONTESTANTS = ("plain", "trl", "raco linear", "raco cagrad-clip")


def trainer(contestant: str, m: int) -> Train:
    """What trains; a rival is loaded here, before anything is measured."""
    if contestant == "trl":
        from bench.rivals import trl_trainer

        return partial(trl_trainer.train, lr=LR)
    return plain if contestant == "plain" else raco(contestant.removeprefix("raco "), m)


def measure(contestant: str, setting: Setting, m: int, steps: int) -> dict[str, Any]:
    """Train, and say what it took.

    Returns:
        seconds: of each step after the warm-up.
        peak_bytes: at the peak of those steps, above the memory held once the model was built.
        model_bytes: of the model itself.
        losses: objective 0 before the first and after the last step, warm-up included.
    """
    train = trainer(contestant, m)
    problem = FreshProblem(setting)
    meter = Meter(torch.device(setting.device), WARMUP)
    before = problem.loss()
    train(problem, WARMUP + steps, meter=meter)
    return {
        "seconds": meter.seconds,
        "peak_bytes": meter.peak(),
        "model_bytes": sum(p.numel() * p.element_size() for p in problem.model.parameters()),
        "losses": [before, problem.loss()],
    }


def command(contestant: str, setting: Setting, m: int, steps: int) -> list[str]:
    """The arguments of `python` that measure it once."""
    options = ["--contestant", contestant, "--m", str(m), *setting.options()]
    return ["-m", "bench.bench_train", *options, "--steps", str(steps)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="time and memory of whole DPO training steps")
    parser.add_argument("--contestant", required=True, choices=CONTESTANTS)
    parser.add_argument("--kind", default="lora", choices=["lora", "full"])
    parser.add_argument("--m", type=int, default=1, help="objectives")
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="that count")
    options = parser.parse_args(arguments)
    setting = Setting(**{f.name: getattr(options, f.name) for f in fields(Setting)})
    print(json.dumps(measure(options.contestant, setting, options.m, options.steps)))


if __name__ == "__main__":
    main()
