"""Seconds of a pair and peak memory of whole DPO steps, beside TRL's `DPOTrainer` and plain torch.

    python -m bench.suites.train --contestant "raco pairs" --kind lora --m 2      # one process

A trainer owns its loop, so contestants cannot alternate call by call: each turn in a round is a
fresh process that trains one contestant for a few steps, and rounds repeat. Ours is the public API
in a loop of the caller's own. The trainer of raco_fast.dpo computes the same, but has no hook
around a step, and its step writes a line of metrics to a file, which would be timed here for us
alone. TRL and plain torch train on one objective, the first of our m.

All learn from the same pairs, those of one step, whose lengths are those of data
(harness/lengths.py), and each cuts them into micro-batches of its own size: of those that it tries
in the first round, the fastest is used from then on, and the figures are of that one.

TRL has to learn what plain torch learns on the same pairs, and packed rows what padded ones do, or
their times do not count.
"""

import json
import shlex
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

import raco_fast
from bench.harness import dpo_problem, flops, jobs, lengths, optional
from bench.harness.meter import Meter
from bench.harness.pairs_problem import Judge, PairsProblem, PairsSetting
from bench.harness.session import Session
from bench.harness.timing import Times
from bench.harness.training_cells import (
    CONTESTANTS,
    FEW,
    MANY,
    PACKED,
    PADDED,
    PAIRS,
    PLAIN,
    SIZES,
    TRL,
    TRL_AS_IT_COMES,
    Cell,
    way_of,
)
from bench.rivals import pair_steps
from bench.rivals.pair_ways import Part, attention, parts

NAME = "train"
WARMUP = 1
"""Steps that do not count: the first has new memory."""
# Names in committed records -> what they are called now.
FORMER = {"plain": PLAIN, "raco cagrad-clip": PADDED}
_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}
"""Of the change of plain DPO's loss over all steps; rivals compute the same in another order."""


class Measured:
    """What the processes of one contestant said, or why one of them said nothing."""

    def __init__(self, contestant: str, m: int, cell: Cell) -> None:
        self.contestant, self.m, self.cell = contestant, m, cell
        needs = TRL if contestant == TRL_AS_IT_COMES else contestant
        self.failure = optional.obstacle(cell.setting.kind) or optional.obstacle(needs)
        self._said: dict[int, list[dict[str, Any]]] = {}

    def take_turn(self, until: float) -> None:
        """Run its process with each size, or once more with the best, unless it failed before."""
        if self.failure is not None:
            return
        for size in [self.best] if self._said else self.cell.sizes(self.contestant):
            said = jobs.measured(self.command(size), until)
            if "failure" not in said:
                self._said.setdefault(size, []).append(said)
            elif said["failure"] != jobs.LEFT_OUT or not self._said:
                self.failure = said["failure"]

    def command(self, size: int) -> list[str]:
        """The arguments of `python` that measure it once."""
        options = ["--contestant", self.contestant, *self.cell.setting.options(self.m)]
        counts = ["--at_once", str(size), "--steps", str(self.cell.steps)]
        return ["-m", "bench.suites.train", *options, *counts]

    @property
    def best(self) -> int:
        """The size of a micro-batch at which its steps were fastest."""
        return min(self._said, key=lambda size: self._seconds(size).quantiles()[1])

    @property
    def said(self) -> list[dict[str, Any]]:
        """By its processes of that size."""
        return self._said[self.best]

    @property
    def times(self) -> Times:
        """Seconds of a pair, of every step of every process of that size."""
        return self._seconds(self.best)

    @property
    def seconds(self) -> float:
        """Of a pair, the median."""
        return self.times.quantiles()[1]

    @property
    def memory(self) -> int:
        """Bytes at the peak, the model included."""
        return max(said["model_bytes"] + said["peak_bytes"] for said in self.said)

    @property
    def reference(self) -> float:
        """Seconds of a pair's reference pass, the median."""
        of_step = median(float(said["reference_seconds"]) for said in self.said)
        return of_step / self.cell.setting.pairs

    @property
    def learnt(self) -> float:
        """How far the loss of the first objective fell."""
        before, after = self.said[-1]["losses"]
        return float(before - after)

    def _seconds(self, size: int) -> Times:
        steps = [s for said in self._said[size] for s in said["seconds"]]
        return Times([s / self.cell.setting.pairs for s in steps])


def run(session: Session) -> None:
    for cell in SIZES[session.sizes]:
        reason = lengths.obstacle(cell.setting.data)
        if reason is not None:
            session.records.add(f"{NAME}/{PAIRS}", cell.setting.params(FEW), failure=reason)
            continue
        todo = [one for one in cell.contestants if one[0] not in session.skip]
        found = [Measured(*one, cell) for one in todo]
        _rounds(found, cell.rounds, session.until)
        _check_learnt(found)
        peak = session.records.matmul_rate()
        for one in found:
            values = {"failure": one.failure} if one.failure else record(one, found, peak)
            session.records.add(f"{NAME}/{one.contestant}", cell.setting.params(one.m), **values)


def _rounds(contestants: Sequence[Measured], rounds: int, until: float) -> None:
    """Rounds of one process each; the last begins where it can be over in time."""
    longest = 0.0
    for number in range(rounds):
        began = perf_counter()
        if number and began + longest > until:
            break
        for contestant in contestants:
            contestant.take_turn(until)
        longest = max(longest, perf_counter() - began)


def _check_learnt(found: Sequence[Measured]) -> None:
    """Who does not learn what the plainest contestant of as many objectives learns has no time."""
    for contestant, m in ((PLAIN, 1), (PADDED, FEW)):
        plain = _of(found, contestant, m)
        for one in found:
            if plain is None or one.failure is not None or one.m != m:
                continue
            error = abs(one.learnt - plain.learnt) / abs(plain.learnt)
            if not error <= _TOLERANCE[plain.cell.setting.dtype]:
                rival = contestant.split()[0]
                one.failure = f"wrong: its loss fell otherwise than {rival}'s, error {error:.2g}"


def _of(found: Sequence[Measured], contestant: str, m: int) -> Measured | None:
    """The contestant with so many objectives, where it has figures."""
    running = [one for one in found if one.failure is None]
    return next((x for x in running if (x.contestant, x.m) == (contestant, m)), None)


def record(one: Measured, found: Sequence[Measured], matmul: float | None) -> dict[str, Any]:
    """Its figures, and its time and memory over those of others of the same run.

    Args:
        matmul: measured floating-point operations per second of large products, if they were.
    """
    setting, times = one.cell.setting, one.times
    counts = lengths.sample(setting.data, setting.pairs)
    trl, plain = _of(found, TRL, 1), _of(found, PLAIN, 1)
    unit, seconds = trl or plain, one.seconds
    needed = flops.of_step(setting, counts, shared=one.contestant == PAIRS) / setting.pairs
    values = {
        **times.summary(),
        "per": "pair",
        "processes": len(one.said),
        "at_once": one.best,
        "ratio": unit and seconds / unit.seconds,
        "ratio_to": unit and unit.contestant,
        "ratio_to_trl": trl and seconds / trl.seconds,
        "ratio_to_plain": plain and seconds / plain.seconds,
        "memory_to_trl": trl and one.memory / trl.memory,
        "tokens_per_second": sum(x.once for x in counts) / setting.pairs / seconds,
        "tokens_per_second_twice": sum(x.twice for x in counts) / setting.pairs / seconds,
        "computed_tokens": one.said[-1]["tokens"] / setting.pairs,
        "flops_per_second": needed / seconds,
        "of_matmul": matmul and needed / seconds / matmul,
        "peak_bytes": max(said["peak_bytes"] for said in one.said),
        "model_bytes": one.said[-1]["model_bytes"],
        "losses": one.said[-1]["losses"],
        "prompt_ratio": lengths.prompt_ratio(counts),
        "token_ratio": lengths.token_ratio(counts),
        "flops_ratio": flops.of_step(setting, counts, True) / flops.of_step(setting, counts, False),
        **_over_others(one, found, lengths.token_ratio(counts)),
    }
    return {**values, "reproduce": shlex.join(["python", *one.command(one.best)])}


def _over_others(one: Measured, found: Sequence[Measured], ratio: float) -> dict[str, float]:
    """Its time over that of others of ours, where they ran."""
    packed, few, padded = (_of(found, name, FEW) for name in (PACKED, PAIRS, PADDED))
    values: dict[str, float] = {}
    if one.contestant.startswith("raco"):
        values["reference_seconds"] = one.reference
        if padded:
            values["reference_to_padded"] = one.reference / padded.reference
    if one.contestant == PAIRS and one.m == FEW and packed:
        values["over_packed"] = one.seconds / packed.seconds
        values["over_token_ratio"] = values["over_packed"] / ratio
    if one.contestant == PAIRS and one.m == MANY and few:
        values["over_few"] = one.seconds / few.seconds
    return values


def measure(
    contestant: str, setting: PairsSetting, m: int, at_once: int, steps: int
) -> dict[str, Any]:
    """Train in this process, and say what it took.

    Args:
        at_once: pairs, or tokens, of a micro-batch at most.
    Returns:
        seconds: of each step after the warm-up.
        reference_seconds: of a second pass over the pairs of a step without gradients (ours).
        tokens: that a step runs the model on, padding included.
        peak_bytes: at the peak of those steps, above the memory held once the model was built.
        model_bytes: of the model itself.
        losses: of objective 0 before the first and after the last step, warm-up included.
    """
    if contestant.startswith(TRL):
        # Before memory is metered, or its code would count.
        from bench.rivals import trl_trainer
    way = way_of(contestant)
    problem = PairsProblem(setting, attention(way, setting.device))
    of_step = parts(problem, way, at_once)
    meter, judge = Meter(torch.device(setting.device), WARMUP), Judge(problem)
    before, said = judge.loss(), {}
    if contestant.startswith(TRL):
        by_length = [k for part in of_step for k in part.pairs]
        order = by_length if contestant == TRL else range(setting.pairs)
        trl_trainer.train(problem, order, at_once, WARMUP + steps, meter)
    else:
        said = train(problem, contestant, of_step, m, WARMUP + steps, meter)
    return {
        "seconds": meter.seconds,
        **said,
        "tokens": sum(part.tokens for part in of_step),
        "peak_bytes": meter.peak(),
        "model_bytes": sum(p.numel() * p.element_size() for p in problem.model.parameters()),
        "losses": [before, judge.loss()],
    }


def train(
    problem: PairsProblem,
    contestant: str,
    of_step: Sequence[Part],
    m: int,
    steps: int,
    meter: Meter,
    rule: str = "cagrad-clip",
) -> dict[str, float]:
    """Train plain torch or ours for so many steps, each one metered; says what a reference took."""
    if contestant != PLAIN:
        # A few steps would consist of spot checks; in a run they are 1 call of 128.
        raco_fast.prepare(problem.model, strict=True, check_every=None)
    pair_steps.reference(problem, of_step)
    clock = Meter(torch.device(problem.setting.device), warmup=0)
    clock.begin()
    start = pair_steps.reference(problem, of_step)
    clock.end()
    if contestant == PLAIN:
        meter.run(pair_steps.plain(problem, of_step, start), steps)
    else:
        meter.run(pair_steps.ours(problem, of_step, start, m, rule), steps)
    return {"reference_seconds": clock.seconds[0]}


def parser() -> ArgumentParser:
    """Of the command, which measures one contestant and prints JSON."""
    found = dpo_problem.parser(NAME, __doc__, ("lora",), (1,), PairsSetting)
    found.add_argument("--contestant", required=True, choices=(*CONTESTANTS, *FORMER))
    found.add_argument("--at_once", type=int, default=1, help="pairs of a micro-batch, or tokens")
    found.add_argument("--steps", type=int, default=5, help="that count")
    for former in ("--sequences", "--tokens"):  # of records from when all had one length
        found.add_argument(former, type=int, help=SUPPRESS)
    return found


def _today(options: Namespace) -> Namespace:
    """A command of a committed record, as it would be given now."""
    options.contestant = FORMER.get(options.contestant, options.contestant)
    if options.tokens:
        options.data, options.pairs = f"fixed-{options.tokens}", options.sequences // 2
        options.at_once = options.pairs
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _today(parser().parse_args(arguments))
    setting, m = dpo_problem.only(options, PairsSetting)
    print(json.dumps(measure(options.contestant, setting, m, options.at_once, options.steps)))


if __name__ == "__main__":
    main()
