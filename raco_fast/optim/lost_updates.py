"""A warning where rounding to nearest drops most updates of 16-bit weights.

An update smaller than half the distance to the next number leaves a weight as it was, step after
step: the run costs what it costs and learns next to nothing. That is looked for at steps 1, 2, 4,
8, ..., on a few thousand weights, and only there a GPU is waited for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import local
from raco_fast.gradients.objective_grad import Touched

_NARROW = (torch.bfloat16, torch.float16)
_TENSORS, _ELEMENTS = 16, 512  # the largest tensors, and elements of each, that are looked at
_MOST = 0.5


class LostUpdates:
    """Watches the steps of one optimizer and warns once."""

    def __init__(self) -> None:
        self._steps, self._lr, self._warned = 0, 0.0, False

    @contextmanager
    def watched(
        self,
        groups: Sequence[Mapping[str, Any]],
        touched: Sequence[Touched],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        rounding: str,
    ) -> Iterator[None]:
        """Around one update of the parameters `touched` of the optimizer's `groups`."""
        self._steps += 1
        if self._warned or self._steps & (self._steps - 1):
            yield
            return
        chosen = [
            (p, group)
            for group, of_group in zip(groups, touched, strict=True)
            for p in of_group.params
            if _rounds_to_nearest(p, group.get("rounding", rounding))
        ]
        chosen = sorted(chosen, key=lambda pair: -pair[0].numel())[:_TENSORS]
        before = [_sample(p).clone() for p, _ in chosen]
        yield
        if chosen:
            self._compare(chosen, before, state)

    def _compare(
        self,
        chosen: Sequence[tuple[Tensor, Mapping[str, Any]]],
        before: Sequence[Tensor],
        state: Mapping[Tensor, Mapping[str, Tensor]],
    ) -> None:
        lr, before_it = max(float(group["lr"]) for _, group in chosen), self._lr
        self._lr = lr
        if lr == 0.0 or lr > before_it:
            return  # in a warm-up updates are small, and will not stay so
        moving = lost = 0.0
        for (p, _), old in zip(chosen, before, strict=True):
            moves, each = _sample(state[p]["exp_avg"]) != 0, p.numel() / max(1, old.numel())
            moving += each * int(moves.sum())
            lost += each * int((moves & (_sample(p) == old)).sum())
        if lost > _MOST * moving:
            self._warned = True
            warnings.warn(_message(lost / moving, lr, chosen[0][0].dtype), stacklevel=2)


def _rounds_to_nearest(p: Tensor, rounding: str) -> bool:
    return p.dtype in _NARROW and (rounding == "nearest" or p.dtype != torch.bfloat16)


def _sample(t: Tensor) -> Tensor:
    """A view of some elements of what lies here of a tensor, the same ones at every call."""
    here = local(t.detach())
    most = max(1, round(_ELEMENTS ** (1 / max(1, here.dim()))))
    return here[tuple(slice(None, None, max(1, n // most)) for n in here.shape)]


def _message(share: float, lr: float, dtype: torch.dtype) -> str:
    cure = "use rounding='split' (2 bytes more a weight) or rounding='stochastic', which keep them"
    if dtype != torch.bfloat16:
        cure = "hold the weights in float32, or in bfloat16 with rounding='split' or 'stochastic'"
    return (
        f"rounding to nearest loses {share:.0%} of the updates of {str(dtype).split('.')[1]} "
        f"weights at learning rate {lr:g}: they are smaller than half the distance to the next "
        f"number, so the model learns next to nothing; {cure}, or take a larger learning rate"
    )
