"""Time against size: the step against parameters and m, one backward pass against tokens and m.

Each record has `size` and what it is `against`; the report fits the slope of log time on log size.
A slope of 1: time is proportional to size; 0: it does not depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from bench.harness.dpo_problem import GPU, TINY, Problem, Setting
from bench.harness.problems import random_like
from bench.harness.session import Session
from bench.harness.timing import Call, interleaved, shares
from bench.rivals.dpo_steps import STEPS
from bench.suites.step import optimizer

NAME = "scaling"
REPRODUCE = "python -m bench tests scaling --device cpu --out runs/scaling"


_UP_TO_16 = (2, 4, 8, 16)
# Sizes -> (parameters and numbers of objectives of a step, tokens and numbers of a backward pass,
# and its setting).
SIZES = {
    "gpu": ((10**7, 10**8, 10**9, 4 * 10**9), _UP_TO_16, (128, 256, 512, 1024), _UP_TO_16, GPU),
    "cpu": (
        *((10**6, 10**7, 5 * 10**7), (2, 4, 8), (16, 32, 64), (2, 4, 8)),
        Setting(layers=2, tokens=32),
    ),
    "cpu-whole": (
        *((10**6, 10**7, 10**8), _UP_TO_16, (32, 64, 128, 256), _UP_TO_16),
        Setting(layers=6),
    ),
    "tiny": ((100, 1000), (2, 3), (10, 20), (2, 3), TINY),
}


def run(session: Session) -> None:
    parameters, step_m, tokens, backward_m, setting = SIZES[session.sizes]
    device, n = session.device, parameters[-2]
    swept: list[tuple[str, str, Sequence[int], Callable[[int], Call]]] = [
        ("step", "parameters", parameters, lambda size: _step(device, size, 2)),
        ("step", "m", step_m, lambda m: _step(device, n, m)),
        ("one_backward", "tokens of a sequence", tokens, lambda t: _dpo_step(setting, 2, t)),
        ("one_backward", "m", backward_m, lambda m: _dpo_step(setting, m)),
    ]
    for (what, against, values, call), until in shares(swept, session.until):
        times = interleaved({str(size): call(size) for size in values}, device, until)
        for size in values:
            params = {"against": against, "size": size}
            summary = times[str(size)].summary()
            session.records.add(f"{NAME}/{what}", params, **summary, reproduce=REPRODUCE)


def _step(device: torch.device, parameters: int, m: int) -> Call:
    shapes = [(parameters // 10,)] * 10
    params = [nn.Parameter(p) for p in random_like(shapes, torch.float32, device, 100)]
    grads = [random_like(shapes, torch.float32, device, seed) for seed in range(m)]
    return optimizer(params, grads).step


def _dpo_step(setting: Setting, m: int, tokens: int | None = None) -> Call:
    setting = replace(setting, tokens=tokens or setting.tokens)
    return STEPS["one_backward"](Problem(setting, prepared=True), m)
