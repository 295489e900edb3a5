"""One DPO step with m objectives beside m backward passes and TorchJD (`bench_backward.py`)."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from bench import bench_backward
from bench.harness.dpo_problem import Setting
from bench.harness.session import Session

NAME = "backward"
# Without our own mode "autograd", which does what "passes" does.
RIVALS = tuple(name for name in bench_backward.RIVALS if name != "autograd")
QUICK = ("plain", "passes", "torchjd", "one_backward", "gram_first, keep_dy")
# Sizes -> (setting, numbers of objectives, rivals). "cpu" is a part of "cpu-whole", whose model is
# all of SmolLM2-135M and which takes about a quarter of an hour.
SIZES: dict[str, tuple[Setting, tuple[int, ...], tuple[str, ...]]] = {
    "gpu": (
        Setting(sequences=16, tokens=512, dtype="bfloat16", device="cuda"),
        (2, 4, 8),
        RIVALS,
    ),
    "cpu-whole": (Setting(), (2, 4, 8), RIVALS),
    "cpu": (Setting(layers=3, tokens=32), (4,), QUICK),
    "tiny": (Setting(shape="tiny", layers=1, sequences=4, tokens=12), (2,), QUICK),
}


def run(session: Session) -> None:
    setting, ms, rivals = SIZES[session.sizes]
    kinds = ("lora", "full")
    left = len(kinds) * len(ms)
    for kind in kinds:
        of_kind = replace(setting, kind=kind)
        for m in ms:
            share = max(0.0, session.until - perf_counter()) / left
            bench_backward.measure(session.records, of_kind, (m,), rivals, share)
            left -= 1
