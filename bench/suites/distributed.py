"""Time, payload and memory of a DPO step on several processes, beside plain DPO on them.

    python -m bench.suites.distributed --out runs/distributed [--processes 2] [--m 2 4]

Plain DPO (one loss, torch's AdamW) runs under DistributedDataParallel, or under FSDP2, and is the
unit of our modes on plain replicas, or under FSDP2; all take turns on the same processes. Processes
are started here: one for each GPU, on a CPU two with a thread each. The sequences of a setting are
those of one process.

Every mode's Gram matrix is held to that of the averaged gradients; one that is wrong has no time.
Times are those of the slowest process. Memory is that of the fullest one at the peak of its second
step, weights and states included. Payload is what the collectives of that step are given, in units
of the trained parameters (an all-reduce counts twice, see harness/payload.py), beside what it
should be; on one process nothing travels, and nothing is counted.
"""

import gc
import json
import shlex
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter

import torch

from bench.harness import dpo_problem, jobs
from bench.harness.dpo_problem import GPU, TINY, Setting
from bench.harness.meter import Meter
from bench.harness.payload import Payload
from bench.harness.records import Record, Records
from bench.harness.session import Session
from bench.harness.spread_problem import WRAPPERS, SpreadProblem, process_group
from bench.harness.timing import MAX_ROUNDS, MIN_ROUNDS, Call, Times, shares
from bench.rivals.dpo_steps import STEPS, UNPREPARED
from raco_fast import ClippedCAGradAdamW
from raco_fast.distributed.processes import Processes
from raco_fast.settings.paths import expanded

NAME = "distributed"
PLAIN, MODES = "plain", ("autograd", "one_backward", "gram_first")
# (wrapper, contestant) -> (a, b): a step sends a m + b times the parameters.
SENT = {
    ("replicas", PLAIN): (0, 2),  # DistributedDataParallel's all-reduce
    ("replicas", "autograd"): (1, 1),  # m reduce-scatters, and the combination gathered
    ("replicas", "one_backward"): (1, 1),
    ("replicas", "gram_first"): (1, 2),  # m reduce-scatters; the combination reduced and gathered
    ("fsdp2", PLAIN): (0, 3),  # weights gathered forward and backward, gradients reduced
    ("fsdp2", "autograd"): (2, 1),  # the same for each objective's backward pass
    ("fsdp2", "one_backward"): (1, 2),
    ("fsdp2", "gram_first"): (1, 4),  # and an ordinary backward pass
}
# Sizes -> (setting, numbers of objectives).
SIZES: dict[str, tuple[Setting, tuple[int, ...]]] = {
    "gpu": (GPU, (2,)),
    "cpu-whole": (Setting(shape="Llama-50M", layers=6, sequences=4), (2, 4)),
    "cpu": (Setting(shape="Llama-8M", layers=4, sequences=4), (2,)),
    "tiny": (TINY, (2,)),
}
# Of a Gram matrix, relative to the gradients' norms; beyond it a mode computes something else.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
_GRACE = 10.0  # for what is under way when the time is over
_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo"}  # a look-up of the host's name may wait for ever
# glibc: what is allocated is the resident set then, as in the suite `memory`.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def expected_payload(wrapper: str, name: str, m: int, apart: float) -> float:
    """What a step sends, in units of the parameters, all of which are trained.

    Args:
        apart: the share of them that FSDP2 gathers with the model itself, not with a layer. They
            stay gathered from the forward to the backward pass: one all-gather less.
    """
    per_objective, besides = SENT[wrapper, name]
    return per_objective * m + besides - (apart if wrapper == "fsdp2" else 0.0)


def run(session: Session) -> None:
    setting, ms = SIZES[session.sizes]
    measure(session.records, setting, ms, default_processes(setting.device), session.until)


def default_processes(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else 2


def measure(
    records: Records, setting: Setting, ms: Sequence[int], processes: int, until: float
) -> None:
    """Count and time everything, until that `perf_counter`; the largest of what processes say."""
    again = [*setting.options(*ms), "--processes", str(processes)]
    command = ["-m", f"bench.suites.{NAME}", *again]
    counted = jobs.measured_together(
        [*command, "--count"], processes, until + _GRACE, **_ENVIRONMENT, **_MALLOC
    )
    seconds, timed = str(max(0.0, until - perf_counter())), []
    if not any("failure" in said for said in counted):
        timed = jobs.measured_together(
            [*command, "--seconds", seconds], processes, until + _GRACE, **_ENVIRONMENT
        )
    reproduce = shlex.join(["python", *command[:2], "--out", f"runs/{NAME}", *again])
    for m in ms:
        for wrapper in WRAPPERS:
            params = {"m": m, "wrapper": wrapper, "processes": processes}
            params |= {k: v for k, v in setting.params(m).items() if k != "m"}
            for name in (PLAIN, *MODES):
                values = _joined(counted, timed, m, wrapper, name, _TOLERANCE[setting.dtype])
                records.add(f"{NAME}/{name}", params, **values, reproduce=reproduce)


def _joined(
    counted: Sequence[Record],
    timed: Sequence[Record],
    m: int,
    wrapper: str,
    name: str,
    tolerance: float,
) -> Record:
    """The figures of one contestant, of all processes."""
    failed = [said for said in (*counted, *timed) if "failure" in said]
    if failed:
        return failed[0]
    found = [said[_key(m, wrapper, name)] for said in timed]
    error = max(one["error"] for one in found)
    if not error <= tolerance:
        return {"failure": f"wrong: error {error:.2g}, at most {tolerance:.2g}"}
    counts = [said[_key(m, wrapper, name)] for said in counted]
    times = _slowest(one["seconds"] for one in found)
    unit = _slowest(said[_key(m, wrapper, PLAIN)]["seconds"] for said in timed)
    return {
        **times.summary(),
        "ratio": times.quantiles()[1] / unit.quantiles()[1],
        "error": error,
        **{k: max(one[k] for one in counts) for k in counts[0]},
    }


def _slowest(seconds: Iterator[list[float]]) -> Times:
    """Of each step the time of the slowest process."""
    return Times([max(step) for step in zip(*seconds, strict=True)])


def _key(m: int, wrapper: str, name: str) -> str:
    return f"{m} {wrapper} {name}"


def count(setting: Setting, ms: Sequence[int]) -> Record:
    """Payload and memory of every contestant on this process, one after the other."""
    all_of = [(m, wrapper, name) for m in ms for wrapper in WRAPPERS for name in (PLAIN, *MODES)]
    for _, wrapper, name in all_of[: len(all_of) // len(ms)]:  # loads all code that a step needs
        _counted(replace(TINY, device=setting.device, dtype=setting.dtype), ms[0], wrapper, name)
    gc.collect()
    gc.freeze()  # or every search for cycles of models would go through all modules
    found = {}
    for one in all_of:
        found[_key(*one)] = _counted(setting, *one)
        gc.collect()
    return found


def _counted(setting: Setting, m: int, wrapper: str, name: str) -> Record:
    meter = Meter(torch.device(setting.device), warmup=1)
    problem = SpreadProblem(setting, wrapper, prepared=name not in UNPREPARED)
    step = STEPS[name](problem, m)
    meter.run(step, 1)
    with Payload() as payload:
        meter.run(step, 1)
    found = {"memory_bytes": meter.peak()}
    if torch.distributed.get_world_size() == 1:
        return found
    return found | {
        "payload": payload.bytes / problem.trained_bytes,
        "expected": expected_payload(wrapper, name, m, problem.apart),
        "messages": payload.messages,
    }


def clock(setting: Setting, ms: Sequence[int], until: float) -> Record:
    """Error and seconds of every contestant on this process, all in turn for each m."""
    found: Record = {}
    for m, share in shares(ms, until):
        steps, errors = {}, {}
        truth = SpreadProblem(setting, WRAPPERS[0], prepared=True).gram(m)
        for wrapper in WRAPPERS:
            bare, prepared = (SpreadProblem(setting, wrapper, p) for p in (False, True))
            for name in (PLAIN, *MODES):
                key, problem = _key(m, wrapper, name), bare if name in UNPREPARED else prepared
                errors[key] = 0.0 if name == PLAIN else disagreement(problem, m, name, truth)
                steps[key] = STEPS[name](problem, m)
        for key, seconds in _in_turn(steps, torch.device(setting.device), share).items():
            found[key] = {"seconds": seconds, "error": errors[key]}
    return found


def disagreement(problem: SpreadProblem, m: int, mode: str, truth: torch.Tensor) -> float:
    """How far a mode's Gram matrix is from the truth, in units of the gradients' norms."""
    # A step of length zero, so that all modes are asked at the same parameters.
    opt = ClippedCAGradAdamW(problem.params, lr=0.0, weights=[1 / m] * m)
    scores = problem.scores()
    opt.backward(problem.losses(scores, m), scores=scores, mode=mode)
    opt.step()
    opt.zero_grad()
    norms = truth.diagonal().sqrt()
    difference = torch.as_tensor(opt.solution.gram) - truth
    return float((difference / torch.outer(norms, norms)).abs().max())


def _in_turn(steps: dict[str, Call], device: torch.device, until: float) -> dict[str, list[float]]:
    """Seconds of each step, which all processes begin together and take the same number of."""
    processes = Processes()
    meters = {key: Meter(device, warmup=1) for key in steps}
    for number in range(MAX_ROUNDS + 1):
        over = torch.tensor([number > MIN_ROUNDS and perf_counter() > until])
        if bool(processes.largest(over.int())):
            break
        for key, step in steps.items():
            processes.largest(torch.zeros(1, dtype=torch.int32))  # wait for each other
            meters[key].run(step, 1)
    return {key: meter.seconds for key, meter in meters.items()}


def parser() -> ArgumentParser:
    found = dpo_problem.parser(NAME, __doc__, ("full",), ms=(2, 4))
    found.set_defaults(shape="Llama-8M", layers=4, sequences=4)
    found.add_argument("--out", type=expanded, default=f"runs/{NAME}", help="folder of report.json")
    found.add_argument("--seconds", type=float, default=600.0, help="at most, for all steps")
    found.add_argument("--processes", type=int, help="default: one for each GPU, 2 on a CPU")
    found.add_argument("--count", action="store_true", help=SUPPRESS)
    found.add_argument("--rank", type=int, help=SUPPRESS)
    found.add_argument("--store", help=SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    (setting,) = dpo_problem.chosen(options, Setting)
    processes = options.processes or default_processes(setting.device)
    until = perf_counter() + options.seconds
    if options.rank is None:
        measure(Records(options.out, options.device), setting, options.m, processes, until)
        return
    with process_group(setting.device, options.rank, processes, options.store):
        said = count(setting, options.m) if options.count else clock(setting, options.m, until)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
