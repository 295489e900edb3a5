"""The parts of a run: their order, how long each may take, and the options of every command."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from importlib import import_module
from time import perf_counter

import torch

from bench.harness import correctness
from bench.harness.cases import SIZES
from bench.harness.records import OURS, Records
from bench.harness.session import Session

# Part -> seconds in a run of all; the time that a part does not need is not given to others.
SECONDS = {
    "tests": 60,
    "ceilings": 10,
    "solve": 20,
    "gram": 30,
    "combine_adamw": 30,
    "step": 45,
    "backward": 100,
    "memory": 60,
    "train": 120,
    "ratios": 30,
    "distributed": 60,
    "scaling": 40,
}
PARTS = tuple(SECONDS)


def add_options(parser: ArgumentParser) -> None:
    """Which parts are run, and how."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("parts", nargs="*", type=_part, default=PARTS, metavar="PART")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--sizes", choices=SIZES, help="default: gpu on cuda, cpu on cpu")
    parser.add_argument("--seconds", type=float, help="for all parts together")
    parser.add_argument("--skip", nargs="*", default=(), help="rivals to leave out")


def run_parts(options: Namespace) -> None:
    """Run the parts in the order given; each gets its share of the seconds."""
    in_all = sum(SECONDS[part] for part in options.parts)
    scale = 1.0 if options.seconds is None else options.seconds / in_all
    sizes = options.sizes or ("gpu" if options.device == "cuda" else "cpu")
    records, device = Records(options.out, options.device), torch.device(options.device)
    for part in options.parts:
        until = perf_counter() + scale * SECONDS[part]
        run_part(part, Session(records, device, sizes, until, tuple(options.skip)))


def run_part(part: str, session: Session) -> None:
    """Run one part, unless what it times has failed its tests; it stops near its deadline."""
    started = perf_counter()
    module = import_module(f"bench.suites.{part}")
    reason = correctness.obstacle(session.records.read(), session.device.type, part)
    if reason is not None:
        session.records.add(f"{part}/{OURS}", {}, failure=reason)
    elif hasattr(module, "run"):
        module.run(session)
    else:
        session.measure(module)
    print(f"bench: {part} took {perf_counter() - started:.0f} s", flush=True)


def _part(name: str) -> str:
    if name not in PARTS:
        raise ArgumentTypeError(f"PART must be one of {', '.join(PARTS)}, got {name}")
    return name
