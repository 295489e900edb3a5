"""How far the gradients of many parameters are from what they should be, in a few operations.

A model that LoRA trains has hundreds of small tensors; a comparison of each by itself would cost as
much as the backward pass that it checks. So small ones are compared a bundle at a time, side by
side in one block, and the host reads the results of a bundle at once.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from raco_fast.backends.transfer import sent
from raco_fast.backends.weight_grad import blocks, widened
from raco_fast.engine.tap import plainly

# Numbers of a bundle, and of the pieces of a larger gradient: what is made of them stays small.
_TOGETHER = {"cpu": 1 << 20}
_TOGETHER_ON_DEVICE = 1 << 24

Take: TypeAlias = Callable[[list[Tensor], list[Tensor]], None]
"""Gets parameters, and a gradient of each; all of one dtype and device."""


def _together(device: torch.device) -> int:
    return _TOGETHER.get(device.type, _TOGETHER_ON_DEVICE)


def fit_in_one(parameters: Sequence[Tensor]) -> bool:
    """Whether all gradients together are no more than a bundle."""
    numbers = sum(p.numel() for p in parameters)
    return all(numbers <= _together(device) for device in {p.device for p in parameters})


class Bundles:
    """Hands gradients on, several small ones at a time.

    Args:
        take: gets them; of a gradient that is large, alone.
    """

    def __init__(self, take: Take) -> None:
        self._take = take
        self._waiting: dict[tuple[torch.device, torch.dtype], dict[Tensor, Tensor]] = {}
        self._numbers = 0

    def add(self, p: Tensor, g: Tensor) -> None:
        """Take the gradient g of p; it may be kept until `finish`."""
        if g.numel() >= _together(g.device):
            self._take([p], [g])
        elif g.numel():
            self._waiting.setdefault((g.device, g.dtype), {})[p] = g
            self._numbers += g.numel()
            if self._numbers >= _together(g.device):
                self.finish()

    def finish(self) -> None:
        """Hand on what waits."""
        waiting = [*self._waiting.values()]
        self._waiting.clear()
        self._numbers = 0
        for bundle in waiting:
            self._take([*bundle], [*bundle.values()])


@torch.no_grad()
def of_combinations(
    r: Tensor, found: Sequence[Tensor | None], expected: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """‖Σ_i r_i g_i - e‖ of each parameter, and the size of the terms, ‖(r_1 g_1 ... r_m g_m)‖.

    Args:
        r: float64 [m] on the CPU.
        found: g [m, *shape] of each parameter, None for zeros.
        expected: e of each, of one dtype and device.
    """
    zeros = expected[0].new_zeros(()).expand(len(r), max(e.numel() for e in expected))
    pairs = zip(found, expected, strict=True)
    gs = [zeros[:, : e.numel()] if g is None else g.flatten(1) for g, e in pairs]
    sizes = [e.numel() for e in expected]
    with plainly(expected[0].device.type):  # autocast would round the combination
        if len(expected) > 1:
            E = torch.cat([e.flatten() for e in expected])
            norms = on_host(_norms(r, torch.cat(gs, 1), E, sizes)).view(2, -1)
        else:
            (g,), E = gs, expected[0].flatten()
            pieces = [
                norm
                for a, b in blocks(len(E), _together(E.device))
                for norm in _norms(r, g[:, a:b], E[a:b], [b - a])
            ]
            norms = torch.linalg.vector_norm(on_host(pieces).view(-1, 2, 1), dim=0)
    differences, of_terms = norms.tolist()
    return differences, of_terms


def _norms(r: Tensor, g: Tensor, e: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """The norms of `of_combinations`, of parts of so many columns of g [m, n] and e [n]."""
    g = widened(g)
    terms = g * sent(r, g.device).to(g.dtype)[:, None]
    # Not the norms of columns, for which torch is slow on a CPU.
    rows = terms.sum(0) - widened(e), terms.square().sum(0).sqrt_()
    parts = [part for row in rows for part in torch.split(row, sizes)]
    norms: Sequence[Tensor] = torch._foreach_norm(parts)
    return norms


def on_host(scalars: Sequence[Tensor]) -> Tensor:
    """float64 [n] on the CPU, of n tensors of shape []: one copy from each device."""
    alike: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for k, x in enumerate(scalars):
        alike[x.device, x.dtype].append(k)
    values = torch.empty(len(scalars), dtype=torch.float64)
    for places in alike.values():
        values[places] = torch.stack([scalars[k] for k in places]).cpu().double()
    return values
