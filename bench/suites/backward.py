"""Time of one DPO step with m objectives, in units of one plain DPO step of the same run.

    python -m bench.suites.backward --out runs/backward [--m 2 4 8] [--kind full lora]

Before it is timed, one backward pass is compared with m of them on the same model; where they
differ, nothing is timed. Rivals take turns in one process; medians.
"""

import shlex
from argparse import ArgumentParser
from collections.abc import Sequence
from time import perf_counter

import torch

from bench.harness import dpo_problem, optional
from bench.harness.dpo_problem import GPU_KINDS, KINDS, TINY, Problem, Setting, of_kinds
from bench.harness.records import Records
from bench.harness.session import Session
from bench.harness.timing import interleaved, shares
from bench.rivals.dpo_steps import STEPS, UNPREPARED, disagreement
from raco_fast.settings.paths import expanded

NAME = "backward"
RIVALS = tuple(name for name in STEPS if name != "gram_first, step_in_backward")
# Without our own mode "autograd", which does what "passes" does.
_MOST = tuple(name for name in RIVALS if name != "autograd")
_FEW = ("plain", "passes", "torchjd", "one_backward", "gram_first, keep_dy")
_GRAM_FIRST = ("gram_first", "gram_first, keep_dy")
# Sizes -> (settings, numbers of objectives, rivals). "cpu" is a part of "cpu-whole", whose model is
# all of SmolLM2-135M and which takes about a quarter of an hour.
SIZES: dict[str, tuple[tuple[Setting, ...], tuple[int, ...], tuple[str, ...]]] = {
    "gpu": (GPU_KINDS, (2, 4), ("plain", "passes", "one_backward", *_GRAM_FIRST)),
    "cpu-whole": (of_kinds(Setting()), (2, 4, 8), _MOST),
    "cpu": (of_kinds(Setting(layers=3, tokens=32)), (4,), _FEW),
    "tiny": (of_kinds(TINY), (2,), _FEW),
}
# Relative, of any parameter's gradients; beyond it one backward pass computes something else.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}


def run(session: Session) -> None:
    settings, ms, rivals = SIZES[session.sizes]
    todo = [(setting, m) for setting in settings for m in ms]
    for (of_kind, m), until in shares(todo, session.until):
        measure(session.records, of_kind, m, rivals, until)


def measure(
    records: Records, setting: Setting, m: int, rivals: Sequence[str], until: float
) -> None:
    """Time the rivals at m objectives, until that `perf_counter`."""
    params = setting.params(m)
    obstacles = {name: optional.obstacle(name) for name in rivals}
    if (failure := optional.obstacle(setting.kind)) is not None:
        obstacles, rivals = {"one_backward": failure}, ()
    for name, failure in obstacles.items():
        if failure is not None:
            records.add(f"{NAME}/{name}", params, failure=failure)
    rivals = [name for name in rivals if obstacles[name] is None]
    if not rivals:
        return
    bare, prepared = (Problem(setting, prepared) for prepared in (False, True))
    error = disagreement(prepared, m) if m > 1 else 0.0
    if error > _TOLERANCE[setting.dtype]:
        failure = f"not timed: one backward pass and m of them differ by {error:.1g}"
        records.add(f"{NAME}/one_backward", params, failure=failure)
        return
    command = ["python", "-m", "bench.suites.backward", "--out", "runs/backward"]
    command += [*setting.options(m), "--rivals", *rivals]
    calls = {name: STEPS[name](bare if name in UNPREPARED else prepared, m) for name in rivals}
    times = interleaved(calls, torch.device(setting.device), until)
    unit = times["plain"].quantiles()[1]
    for name, taken in times.items():
        values = {**taken.summary(), "ratio": taken.quantiles()[1] / unit, "error": error}
        records.add(f"{NAME}/{name}", params, **values, reproduce=shlex.join(command))


def parser() -> ArgumentParser:
    found = dpo_problem.parser(NAME, __doc__, KINDS, ms=(1, 2, 4, 8))
    found.add_argument("--out", type=expanded, required=True, help="folder of report.json")
    found.add_argument("--rivals", nargs="+", default=RIVALS, choices=RIVALS)
    found.add_argument("--seconds", type=float, default=60.0, help="for each kind and m")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    rivals = dict.fromkeys(("plain", *options.rivals))  # in whose units all are
    records = Records(options.out, options.device)
    for setting in dpo_problem.chosen(options, Setting):
        for m in options.m:
            measure(records, setting, m, [*rivals], perf_counter() + options.seconds)


if __name__ == "__main__":
    main()
