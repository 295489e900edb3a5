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
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from time import perf_counter
from typing import Any

from bench import bench_train
from bench.harness import correctness, jobs, optional
from bench.harness.dpo_problem import Setting
from bench.harness.session import Session
from bench.harness.timing import Times

NAME = "train"
ROUNDS = 3
NEEDS_TRL = "TRL is not installed; pip install 'raco-fast[bench-trl]', or trl>=1.16"
# The change of plain DPO's loss over all steps; rivals compute the same in another order.
_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}


@dataclass(frozen=True)
class Size:
    """What everyone trains on, the numbers of objectives, and the steps that count a process."""

    setting: Setting
    ms: tuple[int, ...]
    steps: int
    rules: tuple[str, ...] = ("cagrad-clip", "linear")

    def contestants(self) -> Iterator[tuple[str, int]]:
        """(contestant, m), the most telling first: a run may be cut short."""
        yield from (("plain", 1), ("trl", 1))
        yield from ((f"raco {rule}", m) for m in self.ms for rule in self.rules)


# A process takes 5 to 10 s before it trains: on one core a round of "cpu" takes a minute, one of
# "cpu-whole" ten.
SIZES = {
    "gpu": Size(Setting(sequences=16, tokens=512, dtype="bfloat16", device="cuda"), (2, 4), 10),
    "cpu-whole": Size(Setting(), (2, 4), 3),
    "cpu": Size(Setting(layers=4, sequences=4, tokens=32), (2,), 3, ("cagrad-clip",)),
    "tiny": Size(Setting(shape="tiny", layers=1, sequences=4, tokens=12), (2,), 2),
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


Found = dict[tuple[str, int], Measured]
"""(contestant, m) -> what its processes said."""


def run(session: Session) -> None:
    reason = correctness.obstacle(session.records.read(), session.device.type, NAME)
    if reason is not None:
        session.records.add(NAME, {}, failure=reason)
        return
    size = SIZES[session.sizes]
    kinds = ("lora", "full")
    for number, kind in enumerate(kinds):
        now = perf_counter()
        setting = replace(size.setting, kind=kind)
        found = {
            (contestant, m): Measured(
                bench_train.command(contestant, setting, m, size.steps),
                failure=optional.obstacle(kind) or _missing(contestant),
            )
            for contestant, m in size.contestants()
            if contestant not in session.skip
        }
        _rounds(list(found.values()), now + (session.until - now) / (len(kinds) - number))
        _check(found, setting)
        _add(session, found, setting)


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


def _check(found: Found, setting: Setting) -> None:
    """A rival that learns something else than plain torch on the same pairs is wrong."""
    running = {name: one for (name, _), one in found.items() if one.failure is None}
    if not {"plain", "trl"} <= running.keys():
        return
    expected = running["plain"].learnt
    error = abs(running["trl"].learnt - expected) / abs(expected)
    if not error <= _TOLERANCE[setting.dtype]:
        running["trl"].failure = f"wrong: its loss fell otherwise than plain's, error {error:.2g}"


def _add(session: Session, found: Found, setting: Setting) -> None:
    unit_name, unit = _unit(found)
    for (contestant, m), one in found.items():
        params = setting.params(m)
        reproduce = shlex.join(["python", *one.command])
        name = f"{NAME}/{contestant}"
        if one.failure is not None:
            session.records.add(name, params, failure=one.failure, reproduce=reproduce)
            print(f"{name} {setting.kind} m={m}: {one.failure}", flush=True)
            continue
        low, middle, high = one.times.quantiles()
        ratio = None if unit is None else middle / unit
        rate = setting.sequences * setting.tokens / middle
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
            f"{name:<24} {setting.kind} m={m}: {middle:.3f} s ({low:.3f}-{high:.3f}), {shown}, "
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
