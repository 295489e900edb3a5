"""Peak memory of one DPO step above weights and optimizer states, mode by mode.

    python -m bench.suites.memory --out runs/memory [--m 2 4] [--layers 30]

Each mode runs in a process of its own; the peak is that of a second step (harness/meter.py), less
what there was before the first and less AdamW's two states. What a mode keeps between steps counts,
what malloc keeps does not.
"""

import json
import shlex
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from time import perf_counter

import torch

from bench.harness import dpo_problem, jobs
from bench.harness.dpo_problem import GPU, TINY, Problem, Setting
from bench.harness.meter import Meter
from bench.harness.records import Records
from bench.harness.session import Session
from bench.rivals.dpo_steps import STEPS, UNPREPARED
from raco_fast.settings.paths import expanded

NAME = "memory"
MODES = tuple(name for name in STEPS if name not in ("passes", "torchjd"))
# Sizes -> (setting, numbers of objectives).
SIZES: dict[str, tuple[Setting, tuple[int, ...]]] = {
    "gpu": (GPU, (2, 4)),
    "cpu-whole": (Setting(), (2, 4)),
    "cpu": (Setting(layers=3), (2,)),
    "tiny": (TINY, (2,)),
}
_GRACE = 30.0
# glibc: map every larger block by itself, so that the resident set is what is allocated and not
# what malloc keeps for later. It costs time, which is not measured here.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def run(session: Session) -> None:
    setting, ms = SIZES[session.sizes]
    # A mode that is under way when the time is over may end: most of it is the start of a process.
    measure(session.records, setting, ms, session.until + _GRACE)


def measure(records: Records, setting: Setting, ms: Sequence[int], until: float) -> None:
    """Peak of every mode for each number of objectives, until that `perf_counter`."""
    for m in ms:
        unit = None
        for name in MODES:
            command = ["-m", "bench.suites.memory", "--one", name, *setting.options(m)]
            said = jobs.measured(command, until, **_MALLOC)
            if "failure" in said:
                records.add(f"{NAME}/{name}", setting.params(m), **said)
                continue
            used = said["bytes"]
            unit = used if name == "plain" else unit
            values = {"unit": "bytes", "p50": used, "ratio": None if unit is None else used / unit}
            again = [*(f"{k}={v}" for k, v in _MALLOC.items()), "python", *command]
            records.add(f"{NAME}/{name}", setting.params(m), **values, reproduce=shlex.join(again))


def peak(name: str, setting: Setting, m: int) -> int:
    """Bytes at the peak of a second step above weights and states."""
    problem = Problem(setting, prepared=name not in UNPREPARED)
    states = 2 * sum(p.numel() * p.element_size() for p in problem.params)
    meter = Meter(torch.device(setting.device), warmup=1)
    meter.run(STEPS[name](problem, m), 2)
    return meter.peak() - states


def parser() -> ArgumentParser:
    found = dpo_problem.parser(NAME, __doc__, ("full",), ms=(2, 4))
    found.add_argument("--out", type=expanded, default="runs/memory", help="folder of report.json")
    found.add_argument("--seconds", type=float, default=1800.0, help="at most, for all")
    found.add_argument("--one", choices=MODES, help=SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.one is not None:
        print(json.dumps({"bytes": peak(options.one, *dpo_problem.only(options, Setting))}))
        return
    until = perf_counter() + options.seconds
    for setting in dpo_problem.chosen(options, Setting):
        measure(Records(options.out, options.device), setting, options.m, until)


if __name__ == "__main__":
    main()
