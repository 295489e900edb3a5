"""Contestants for one case: the calls that are timed, and how each is held to the truth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import raco_fast
from bench.harness.cases import Case
from bench.harness.problems import Tensors, Weights, probed
from bench.harness.records import OURS
from bench.harness.timing import Call

# The reference backend works in small blocks: on the largest lists it only costs time.
REFERENCE_UP_TO = 1_000_000_000


@dataclass
class Contest:
    """`error(name)` runs that call once and says how far from the truth it came.

    Ours may be off by `tolerance`.
    """

    calls: dict[str, Call]
    error: Callable[[str], float]
    tolerance: float


def failures() -> tuple[type[Exception], ...]:
    """What a contestant may raise: out of memory, a driver's error, a compiler that gave up."""
    if find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def our_calls(case: Case, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """`call` on our kernels, and on their plain twin.

    The backend is forced: a call that the kernels cannot take fails instead of being timed on
    another backend.
    """
    fast = "triton" if case.device.type == "cuda" else "cpu"
    found = {OURS: raco_fast.backend(fast)(call)}
    if case.elements <= REFERENCE_UP_TO:
        found["reference"] = raco_fast.backend("reference")(call)
    return found


def contest_of_steps(
    calls: dict[str, Call], weights: Weights, grads: Sequence[Tensors], alpha: Tensor
) -> Contest:
    """A contest of AdamW steps along Σ α_i g_i; joined by `adamw`, which steps along g_1.

    The error is in units of the step itself. The tolerance is a few times what rounding leaves of
    the step in float32, and in bfloat16 weights and states.
    """
    calls = {**calls, "adamw": lambda: weights.step_of_adamw(grads[0])}

    def error(name: str) -> float:
        weights.restart()
        along = (grads[:1], torch.ones_like(alpha[:1])) if name == "adamw" else (grads, alpha)
        before, after = weights.stepped(*along)
        calls[name]()
        found = probed(weights.params)
        return float((found - after).abs().mean() / (after - before).abs().mean())

    wide = weights.params[0].dtype == torch.float32
    return Contest(calls, error, tolerance=1e-5 if wide else 0.02)
