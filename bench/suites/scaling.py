"""Time against size: the step against parameters and m, one backward pass against tokens and m.

Each record has `size` and what it is `against`; the report fits the slope of log time on log size.
A slope of 1 is a price per item, 0 a price of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import nn

from bench.harness.dpo_problem import Problem, Setting
from bench.harness.problems import random_like
from bench.harness.session import Session
from bench.harness.timing import Call, interleaved
from bench.rivals.dpo_steps import STEPS
from bench.suites.step import optimizer

NAME = "scaling"
REPRODUCE = "python -m bench tests scaling --device cpu --out runs/scaling"


@dataclass(frozen=True)
class Sizes:
    """Parameters and numbers of objectives of a step; tokens and numbers of a backward pass."""

    parameters: tuple[int, ...]
    step_m: tuple[int, ...]
    tokens: tuple[int, ...]
    backward_m: tuple[int, ...]
    setting: Setting


SIZES = {
    "gpu": Sizes(
        (10**7, 10**8, 10**9, 4 * 10**9),
        (2, 4, 8, 16),
        (128, 256, 512, 1024),
        (2, 4, 8, 16),
        Setting(sequences=16, tokens=512, dtype="bfloat16", device="cuda"),
    ),
    "cpu": Sizes(
        (10**6, 10**7, 5 * 10**7), (2, 4, 8), (16, 32, 64), (2, 4, 8), Setting(layers=2, tokens=32)
    ),
    "cpu-whole": Sizes(
        (10**6, 10**7, 10**8), (2, 4, 8, 16), (32, 64, 128, 256), (2, 4, 8, 16), Setting(layers=6)
    ),
    "tiny": Sizes(
        (100, 1000),
        (2, 3),
        (10, 20),
        (2, 3),
        Setting(shape="tiny", layers=1, sequences=4, tokens=12),
    ),
}


def run(session: Session) -> None:
    sizes, quarter = SIZES[session.sizes], (session.until - perf_counter()) / 4
    started = perf_counter()
    n, setting = sizes.parameters[-2], sizes.setting
    swept: list[tuple[str, str, Sequence[int], Callable[[int], Call]]] = [
        ("step", "parameters", sizes.parameters, lambda size: _step(session.device, size, 2)),
        ("step", "m", sizes.step_m, lambda m: _step(session.device, n, m)),
        ("one_backward", "tokens of a sequence", sizes.tokens, partial(_with_tokens, setting)),
        ("one_backward", "m", sizes.backward_m, lambda m: _dpo_step(setting, m)),
    ]
    for k, (what, against, values, call) in enumerate(swept):
        calls = {str(size): call(size) for size in values}
        times = interleaved(calls, session.device, started + (k + 1) * quarter)
        for size in values:
            taken = times[str(size)]
            low, middle, high = taken.quantiles()
            params = {"against": against, "size": size}
            values_of = {"p20": low, "p50": middle, "p80": high, "rounds": len(taken.device)}
            session.records.add(
                f"{NAME}/{what}", params, unit="s", **values_of, reproduce=REPRODUCE
            )


def _step(device: torch.device, parameters: int, m: int) -> Call:
    shapes = [(parameters // 10,)] * 10
    params = [nn.Parameter(p) for p in random_like(shapes, torch.float32, device, 100)]
    grads = [random_like(shapes, torch.float32, device, seed) for seed in range(m)]
    return optimizer(params, grads).step


def _with_tokens(setting: Setting, tokens: int) -> Call:
    return _dpo_step(replace(setting, tokens=tokens), 2)


def _dpo_step(setting: Setting, m: int) -> Call:
    return STEPS["one_backward"](Problem(setting, prepared=True), m)
