"""Whole steps on the pairs of a `PairsProblem`, micro-batch by micro-batch, theirs and ours."""

from collections.abc import Sequence

import torch
from torch import Tensor

import raco_fast
from bench.harness.pairs_problem import PairsProblem
from bench.harness.timing import Call
from bench.rivals.dpo_steps import ADAMW
from bench.rivals.pair_ways import Part
from raco_fast.dpo.scoring import adapter_off


@torch.no_grad()
def reference(problem: PairsProblem, parts: Sequence[Part]) -> list[Tensor]:
    """By how much a is above b under the reference, for each part: one forward pass, no adapter."""
    with adapter_off(problem.model):
        return [_margins(problem, part) for part in parts]


def plain(problem: PairsProblem, parts: Sequence[Part], start: Sequence[Tensor]) -> Call:
    """Plain DPO with torch's fused AdamW: objective 0 alone."""
    optimizer = torch.optim.AdamW(problem.params, **ADAMW, fused=True)

    def step() -> None:
        for part, before in zip(parts, start, strict=True):
            margins = _margins(problem, part) - before
            problem.losses(margins, part.pairs, 1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    problem: PairsProblem, parts: Sequence[Part], start: Sequence[Tensor], m: int, rule: str
) -> Call:
    """m objectives in one backward pass of each part.

    Args:
        problem: with a prepared model.
    """
    weights = [1 / m] * m
    optimizer = raco_fast.ClippedCAGradAdamW(problem.params, **ADAMW, weights=weights, rule=rule)

    def step() -> None:
        for part, before in zip(parts, start, strict=True):
            logps = part.logps(problem.model)
            a, b = logps.chunk(2)
            losses = problem.losses(a - b - before, part.pairs, m)
            optimizer.backward(losses, scores=logps, mode="one_backward")
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.skipped_steps == 0  # a step that did nothing would be timed

    return step


def _margins(problem: PairsProblem, part: Part) -> Tensor:
    a, b = part.logps(problem.model).chunk(2)
    return a - b
