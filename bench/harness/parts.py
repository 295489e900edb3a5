"""The parts of a run: their order, and how long each may take of a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from time import perf_counter

import torch

from bench.harness.records import Records
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
    "train": 60,
    "scaling": 40,
}
PARTS = tuple(SECONDS)


def run_part(
    part: str, records: Records, device: str, sizes: str, seconds: float, skip: Sequence[str] = ()
) -> None:
    """Run one part, which ends by itself about when its seconds are over."""
    started = perf_counter()
    session = Session(records, torch.device(device), sizes, started + seconds, tuple(skip))
    module = import_module(f"bench.suites.{part}")
    module.run(session) if hasattr(module, "run") else session.measure(module)
    print(f"bench: {part} took {perf_counter() - started:.0f} s", flush=True)


def default_device() -> str:
    """The machine's own: CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_sizes(device: str) -> str:
    """What a device of this kind can run within minutes."""
    return "gpu" if device == "cuda" else "cpu"
