"""Peak memory of one DPO step, mode by mode (`bench_memory.py`)."""

from __future__ import annotations

from bench import bench_memory
from bench.harness.dpo_problem import Setting
from bench.harness.session import Session

NAME = "memory"
_GRACE = 30.0
# Sizes -> (setting, numbers of objectives).
SIZES: dict[str, tuple[Setting, tuple[int, ...]]] = {
    "gpu": (Setting(sequences=16, tokens=512, dtype="bfloat16", device="cuda"), (2, 4)),
    "cpu-whole": (Setting(), (2, 4)),
    "cpu": (Setting(layers=3), (2,)),
    "tiny": (Setting(shape="tiny", layers=1, sequences=4, tokens=12), (2,)),
}


def run(session: Session) -> None:
    setting, ms = SIZES[session.sizes]
    # A mode that is under way when the time is over may end: most of it is the start of a process.
    until = session.until + _GRACE
    bench_memory.measure(session.records, setting, ms, until)
