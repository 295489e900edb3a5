"""Whole DPO training steps of one contestant, in a process of its own; the last line is JSON.

    python -m bench.bench_train --contestant "raco cagrad-clip" --kind lora --m 2

bench/suites/train.py runs it for every contestant in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

import raco_fast
from bench.meter import Meter
from bench.train_problem import LR, MODELS, Problem, Task

WARMUP = 2
"""Steps that do not count: the first has extra passes (`prepare` proves itself) and new memory."""

Train = Callable[[Problem, int, Meter], None]


def plain(problem: Problem, steps: int, meter: Meter) -> None:
    """One objective: one loss, one backward pass, torch's fused AdamW."""
    optimizer = torch.optim.AdamW(problem.trained.values(), lr=LR, weight_decay=0.0, fused=True)
    for _ in range(steps):
        meter.begin()
        problem.losses(problem.scores(), 1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.end()


def raco(rule: str) -> Train:
    """m objectives in one backward pass and one step of `ClippedCAGradAdamW`."""

    def train(problem: Problem, steps: int, meter: Meter) -> None:
        m = problem.task.m
        raco_fast.prepare(problem.model, strict=True)
        optimizer = raco_fast.ClippedCAGradAdamW(
            problem.trained.values(), lr=LR, weight_decay=0.0, weights=[1 / m] * m, rule=rule
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


def trainer(contestant: str) -> Train:
    """What trains; a rival is loaded here, before anything is measured."""
    if contestant == "trl":
        from bench import trl_trainer

        return trl_trainer.train
    return plain if contestant == "plain" else raco(contestant.removeprefix("raco "))


def measure(contestant: str, task: Task, device: torch.device, steps: int) -> dict[str, Any]:
    """Train, and say what it took.

    Returns:
        seconds: of each step after the warm-up.
        peak_bytes: at the peak of those steps, above the memory held once the model was built.
        model_bytes: of the model itself.
        losses: objective 0 before the first and after the last step, warm-up included.
    """
    train = trainer(contestant)
    problem = Problem(task, device)
    meter = Meter(device, WARMUP)
    before = problem.loss()
    train(problem, WARMUP + steps, meter)
    return {
        "seconds": meter.seconds,
        "peak_bytes": meter.peak(),
        "model_bytes": sum(p.numel() * p.element_size() for p in problem.model.parameters()),
        "losses": [before, problem.loss()],
    }


def command(contestant: str, task: Task, device: str, steps: int) -> list[str]:
    """The arguments of `python` that measure it once."""
    values = {"contestant": contestant, **vars(task), "device": device, "steps": steps}
    options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["-m", "bench.bench_train", *options]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="time and memory of whole DPO training steps")
    parser.add_argument("--contestant", required=True, choices=CONTESTANTS)
    parser.add_argument("--kind", default="lora", choices=["lora", "full"])
    parser.add_argument("--m", type=int, default=1, help="objectives")
    parser.add_argument("--model", default="SmolLM2-135M", choices=MODELS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="that count")
    options = parser.parse_args(arguments)
    task = Task(**{f.name: getattr(options, f.name) for f in fields(Task)})
    device = torch.device(options.device)
    print(json.dumps(measure(options.contestant, task, device, options.steps)))


if __name__ == "__main__":
    main()
