"""Tokens per second and peak memory of whole DPO steps, beside TRL's `DPOTrainer` and plain torch.

A trainer owns its loop, so contestants cannot alternate call by call: each turn in a round is a
fresh process (`bench_train.py`) that trains one contestant for a few steps, and rounds repeat.
Ours is the public API in a loop of the caller's own. The trainer of raco_fast.dpo computes the
same, but has no hook around a step, and its step writes a line of metrics to a file, which would
be timed here for us alone. TRL and plain torch train on one objective, the first of our m.

`ratio` is to TRL where it could be run, else to plain torch; `ratio_to` says which. TRL has to
learn what plain torch learns on the same pairs, or its time does not count.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from time import perf_counter
from typing import Any

from bench import bench_train, correctness, jobs
from bench.session import Session
from bench.timing import Times
from bench.train_problem import Task

NAME = "train"
ROUNDS = 3
NEEDS_TRL = "TRL is not installed; pip install 'raco-fast[bench-trl]', or trl>=1.16"
# The change of plain DPO's loss over all steps; rivals compute the same in another order.
_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}


@dataclass(frozen=True)
class Size:
    """What everyone trains on, the numbers of objectives, and the steps that count a process."""

    model: str
    dtype: str
    sequences: int
    tokens: int
    ms: tuple[int, ...]
    steps: int
    rules: tuple[str, ...] = ("cagrad-clip", "linear")

    def tasks(self, kind: str) -> Iterator[tuple[str, Task]]:
        """(contestant, task), the most telling first: a run may be cut short."""
        shape = (self.model, self.dtype, self.sequences, self.tokens)
        for contestant in ("plain", "trl"):
            yield contestant, Task(kind, 1, *shape)
        for m in self.ms:
            for rule in self.rules:
                yield f"raco {rule}", Task(kind, m, *shape)


# A process takes 5 to 10 s before it trains: on one core a round of "cpu" takes a minute, one of
# "cpu-whole" ten.
SIZES = {
    "gpu": Size("SmolLM2-135M", "bfloat16", 16, 512, (2, 4), 10),
    "cpu-whole": Size("SmolLM2-135M", "float32", 8, 64, (2, 4), 3),
    "cpu": Size("SmolLM2-135M, 4 layers", "float32", 4, 32, (2,), 3, ("cagrad-clip",)),
    "tiny": Size("tiny", "float32", 4, 12, (2,), 2),
}


@dataclass
class Measured:
    """What the processes of one contestant said, or why one of them said nothing."""

    command: list[str]
    times: Times = field(default_factory=Times)
    peaks: list[int] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    @property
    def learnt(self) -> float:
        """How far the loss of the first objective fell."""
        before, after = self.last["losses"]
        return before - after

    def take_turn(self, until: float) -> None:
        """Run its process once more, unless it failed before."""
        if self.failure is not None:
            return
        done = jobs.run_together({NAME: [sys.executable, *self.command]}, {}, until)[NAME]
        said = [line for line in done.output.splitlines() if line.startswith('{"seconds"')]
        if done.code == 0 and said:
            self.last = json.loads(said[-1])
            self.times.device += self.last["seconds"]
            self.peaks.append(self.last["peak_bytes"])
        elif done.code is not None:
            self.failure = f"status {done.code}: {done.output.strip()[-400:]}"
        elif not self.peaks:
            self.failure = "left out: the time for this part was used up"


Found = dict[tuple[str, Task], Measured]


def run(session: Session) -> None:
    device = session.device.type
    reason = correctness.obstacle(session.records.read(), device, NAME)
    if reason is not None:
        session.records.add(NAME, {}, failure=reason)
        return
    size = SIZES[session.sizes]
    kinds = ("lora", "full")
    for number, kind in enumerate(kinds):
        now = perf_counter()
        found = {
            (contestant, task): Measured(
                bench_train.command(contestant, task, device, size.steps),
                failure=_missing(contestant),
            )
            for contestant, task in size.tasks(kind)
            if contestant not in session.skip
        }
        _rounds(list(found.values()), now + (session.until - now) / (len(kinds) - number))
        _check(found)
        _add(session, found)


def _missing(contestant: str) -> str | None:
    return NEEDS_TRL if contestant == "trl" and find_spec("trl") is None else None


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


def _check(found: Found) -> None:
    """A rival that learns something else than plain torch on the same pairs is wrong."""
    running = {name: one for (name, _), one in found.items() if one.failure is None}
    if not {"plain", "trl"} <= running.keys():
        return
    expected, task = running["plain"].learnt, next(iter(found))[1]
    error = abs(running["trl"].learnt - expected) / abs(expected)
    if not error <= _TOLERANCE[task.dtype]:
        running["trl"].failure = f"wrong: its loss fell otherwise than plain's, error {error:.2g}"


def _add(session: Session, found: Found) -> None:
    unit_name, unit = _unit(found)
    for (contestant, task), one in found.items():
        params = vars(task)
        reproduce = " ".join(["python", *map(shlex.quote, one.command)])
        name = f"{NAME}/{contestant}"
        if one.failure is not None:
            session.records.add(name, params, failure=one.failure, reproduce=reproduce)
            print(f"{name} {task.kind} m={task.m}: {one.failure}", flush=True)
            continue
        low, middle, high = one.times.quantiles()
        ratio = None if unit is None else middle / unit
        rate = task.tokens_per_step / middle
        session.records.add(
            name,
            params,
            unit="s",
            p20=low,
            p50=middle,
            p80=high,
            rounds=len(one.times.device),
            processes=len(one.peaks),
            ratio=ratio,
            ratio_to=unit_name,
            tokens_per_second=rate,
            peak_bytes=max(one.peaks),
            model_bytes=one.last["model_bytes"],
            losses=one.last["losses"],
            reproduce=reproduce,
        )
        shown = "-" if ratio is None else f"{ratio:.2f} x {unit_name}"
        print(
            f"{name:<24} {task.kind} m={task.m}: {middle:.3f} s ({low:.3f}-{high:.3f}), {shown}, "
            f"{rate:.0f} tokens/s, {max(one.peaks) / 2**20:.0f} MiB above the model",
            flush=True,
        )


def _unit(found: Found) -> tuple[str | None, float | None]:
    """What ratios are to: name and median seconds."""
    times = {name: one.times for (name, _), one in found.items() if one.failure is None}
    for name in ("trl", "plain"):
        if name in times:
            return name, times[name].quantiles()[1]
    return None, None
