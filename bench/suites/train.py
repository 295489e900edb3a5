"""Tokens per second and peak memory of whole DPO steps, beside TRL's `DPOTrainer` and plain torch.

    python -m bench.suites.train --contestant "raco cagrad-clip" --kind lora --m 2     # one process

A trainer owns its loop, so contestants cannot alternate call by call: each turn in a round is a
fresh process that trains one contestant for a few steps, and rounds repeat. Ours is the public API
in a loop of the caller's own. The trainer of raco_fast.dpo computes the same, but has no hook
around a step, and its step writes a line of metrics to a file, which would be timed here for us
alone. TRL and plain torch train on one objective, the first of our m.

`ratio` is to TRL where it could be run, else to plain torch; `ratio_to` says which. TRL has to
learn what plain torch learns on the same pairs, or its time does not count.
"""

import json
import shlex
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

import raco_fast
from bench.harness import dpo_problem, jobs, optional
from bench.harness.dpo_problem import GPU_KINDS, TINY, FreshProblem, Setting, of_kinds
from bench.harness.meter import Meter
from bench.harness.session import Session
from bench.harness.timing import Times, shares
from bench.rivals.dpo_steps import STEPS, ours

NAME = "train"
CONTESTANTS = ("plain", "trl", "raco linear", "raco cagrad-clip")
ROUNDS = 3
WARMUP = 2
"""Steps that do not count: the first has extra passes (`prepare` proves itself) and new memory."""

# The change of plain DPO's loss over all steps; rivals compute the same in another order.
_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}
# Sizes -> (settings, numbers of objectives, rules, steps that count of each process). A process
# takes 5 to 10 s before it trains: on one core a round of "cpu" takes a minute, one of "cpu-whole"
# ten.
_BOTH = ("cagrad-clip", "linear")
SIZES: dict[str, tuple[tuple[Setting, ...], tuple[int, ...], tuple[str, ...], int]] = {
    "gpu": (GPU_KINDS, (2, 4), _BOTH, 10),
    "cpu-whole": (of_kinds(Setting()), (2, 4), _BOTH, 3),
    "cpu": (of_kinds(Setting(layers=4, sequences=4, tokens=32)), (2,), _BOTH[:1], 3),
    "tiny": (of_kinds(TINY), (2,), _BOTH, 2),
}


class Measured:
    """What the processes of one contestant said, or why one of them said nothing."""

    def __init__(self, contestant: str, setting: Setting, m: int, steps: int) -> None:
        self.contestant, self.setting, self.m = contestant, setting, m
        self.command = command(contestant, setting, m, steps)
        self.failure = optional.obstacle(setting.kind) or optional.obstacle(contestant)
        self.said: list[dict[str, Any]] = []

    def take_turn(self, until: float) -> None:
        """Run its process once more, unless it failed before."""
        if self.failure is not None:
            return
        said = jobs.measured(self.command, until)
        if "failure" not in said:
            self.said.append(said)
        elif said["failure"] != jobs.LEFT_OUT or not self.said:
            self.failure = said["failure"]

    @property
    def times(self) -> Times:
        """Seconds of every step of every process."""
        return Times([seconds for said in self.said for seconds in said["seconds"]])

    @property
    def learnt(self) -> float:
        """How far the loss of the first objective fell."""
        before, after = self.said[-1]["losses"]
        return before - after

    def record(self, unit: "Measured | None") -> dict[str, Any]:
        """Its figures, with `ratio` in units of another contestant."""
        if self.failure is not None:
            return {"failure": self.failure}
        middle = self.times.quantiles()[1]
        return {
            **self.times.summary(),
            "processes": len(self.said),
            "ratio": unit and middle / unit.times.quantiles()[1],
            "ratio_to": unit and unit.contestant,
            "tokens_per_second": self.setting.sequences * self.setting.tokens / middle,
            "peak_bytes": max(said["peak_bytes"] for said in self.said),
            "model_bytes": self.said[-1]["model_bytes"],
            "losses": self.said[-1]["losses"],
        }


def run(session: Session) -> None:
    settings, ms, rules, steps = SIZES[session.sizes]
    # The most telling first: a run may be cut short.
    todo = [("plain", 1), ("trl", 1), *((f"raco {rule}", m) for m in ms for rule in rules)]
    todo = [(name, m) for name, m in todo if name not in session.skip]
    for setting, until in shares(settings, session.until):
        found = [Measured(name, setting, m, steps) for name, m in todo]
        _rounds(found, until)
        unit = _unit(found)
        for one in found:
            name, again = f"{NAME}/{one.contestant}", shlex.join(["python", *one.command])
            session.records.add(name, setting.params(one.m), **one.record(unit), reproduce=again)


def _rounds(contestants: Sequence[Measured], until: float) -> None:
    """Rounds of one process each; the last begins where it can be over in time."""
    longest = 0.0
    for number in range(ROUNDS):
        began = perf_counter()
        if number and began + longest > until:
            break
        for contestant in contestants:
            contestant.take_turn(until)
        longest = max(longest, perf_counter() - began)


def _unit(found: Sequence[Measured]) -> Measured | None:
    """What ratios are to: TRL where it learns what plain torch learns, else plain torch."""
    running = {one.contestant: one for one in found if one.failure is None}
    plain, trl = running.get("plain"), running.get("trl")
    if plain and trl:
        error = abs(trl.learnt - plain.learnt) / abs(plain.learnt)
        if not error <= _TOLERANCE[plain.setting.dtype]:
            trl.failure = f"wrong: its loss fell otherwise than plain's, error {error:.2g}"
            return plain
    return trl or plain


Train = Callable[[FreshProblem, int, Meter], None]
"""Trains for so many steps, each one metered."""


def trainer(contestant: str, m: int) -> Train:
    """What trains. TRL is imported here, before memory is metered, or its code would count."""
    if contestant == "trl":
        from bench.rivals import trl_trainer

        return trl_trainer.train

    def train(problem: FreshProblem, steps: int, meter: Meter) -> None:
        build = STEPS["plain"]
        if contestant != "plain":
            raco_fast.prepare(problem.model, strict=True)
            build = ours("one_backward", contestant.removeprefix("raco "))
        meter.run(build(problem, m), steps)

    return train


def measure(contestant: str, setting: Setting, m: int, steps: int) -> dict[str, Any]:
    """Train in this process, and say what it took.

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
    train(problem, WARMUP + steps, meter)
    return {
        "seconds": meter.seconds,
        "peak_bytes": meter.peak(),
        "model_bytes": sum(p.numel() * p.element_size() for p in problem.model.parameters()),
        "losses": [before, problem.loss()],
    }


def command(contestant: str, setting: Setting, m: int, steps: int) -> list[str]:
    """The arguments of `python` that measure it once."""
    options = ["--contestant", contestant, *setting.options(m), "--steps", str(steps)]
    return ["-m", "bench.suites.train", *options]


def parser() -> ArgumentParser:
    """Of the command, which measures one contestant and prints JSON."""
    found = dpo_problem.parser(NAME, __doc__, ("lora",), ms=(1,))
    found.add_argument("--contestant", required=True, choices=CONTESTANTS)
    found.add_argument("--steps", type=int, default=5, help="that count")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    print(json.dumps(measure(options.contestant, *dpo_problem.only(options), options.steps)))


if __name__ == "__main__":
    main()
