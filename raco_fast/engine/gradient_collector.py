"""`GradientCollector`: m gradients of every layer, as a pass delivers the layers.

What a layer has is added to its parameters' gradients at once. Of small parameters (norms, biases,
LoRA's matrices) a call costs more than its arithmetic: their t of every entry (`contributions.py`)
are kept until there are enough of them, and then one product with U serves all. Where a layer's
rows are few as well, its x and dY are kept in place of t, and one product forms those of all layers
of a shape.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from raco_fast.backends.weight_grad import batched_product
from raco_fast.engine.contributions import EntryUse, FactorsUse, MatrixUse
from raco_fast.engine.inner_products import products_within
from raco_fast.engine.sample_products import SampleProducts
from raco_fast.engine.sequences import Factored, Segments
from raco_fast.engine.tap import EVERY_ROW, Call, plainly

# Numbers of a t that waits for others, and of all that wait: on a CPU they stay in a cache, on a
# GPU copies are cheap beside launches.
_LIMITS = {"cpu": (1 << 16, 1 << 20)}
_LIMITS_ON_DEVICE = (1 << 20, 1 << 24)
# Numbers of x and dY that wait in place of their t: a product of so few is all call.
_FEW_ROWS = 1 << 15
# The gradients of parameters that waited lie side by side; each has to begin at an address that
# kernels like.
_ALIGNED = 16


class Into(Protocol):
    """What the m gradients of a pass are added to.

    `at_once`: each layer's gradients are needed before the next layer's, in the same order on all
    processes; then `add_products` is not called.
    """

    at_once: bool

    def buffers(self, p: Tensor) -> tuple[Tensor, bool]:
        """([m, *shape] to add to, whether it is fresh memory to be overwritten)."""

    def add_products(self, params: Sequence[Tensor], U: Tensor, t: Tensor) -> None:
        """Add U t, [m, entries] times [entries, Σ numel]: of distinct parameters, side by side."""

    def wants_inner_products(self, p: Tensor) -> bool:
        """Whether those of p's m gradients are of use once the next layer has added to them."""

    def filled(self, params: Mapping[Tensor, Tensor | None]) -> None:
        """Note that one layer, or several, have added what they have for these parameters.

        Args:
            params: with the inner products [m, m] of what their buffers hold now, None where
                nobody has them.
        """

    def finish(self) -> None:
        """Note that the pass is over."""


def arranged(factored: Factored, call: Call) -> Segments:
    """How the rows of one layer belong to the groups of sequences."""
    index, outer = call.entries
    return factored.segments(index, call.dy.device, outer)


class GradientCollector:
    """G_i += Σ_g U_ig t_g for the wanted parameters of every layer.

    Args:
        factored: A = U · seeds.
        into: what they are added to.
        wanted: the parameters whose gradients count.
        samples: also gets what every sample has with itself, where that is wanted.
    """

    def __init__(
        self,
        factored: Factored,
        into: Into,
        wanted: Iterable[Tensor],
        samples: SampleProducts | None = None,
    ) -> None:
        self._factored, self._into, self._samples = factored, into, samples
        self._wanted = {id(p) for p in wanted}  # Tensor's own hash is Python code
        self._plans: dict[Hashable, tuple[Segments, int, int]] = {}
        self._waiting: dict[tuple[int, torch.dtype], _Waiting] = {}

    def collect(self, call: Call) -> None:
        """Add what one layer has, or keep it for `finish`."""
        segments, small, together = self._plan(call)
        out: dict[Tensor, tuple[Tensor, bool]] = {}
        inner: dict[Tensor, Tensor | None] = {}
        used: set[Tensor] = set()
        for p, rows, use in call.uses(segments):
            if id(p) not in self._wanted:
                continue
            if self._samples is not None:
                used.add(p)
            if rows is EVERY_ROW and isinstance(use, EntryUse):
                numbers = use.segments.entries * p.numel()
                if 0 < numbers <= small and p.numel() % _ALIGNED == 0:
                    self._keep(p, use, numbers, together)
                    continue
            if p not in out:
                out[p] = self._into.buffers(p)
            gradients, fresh = out[p]
            target, U = gradients[:, rows], self._factored.coefficients
            whole = isinstance(use, MatrixUse) and rows is EVERY_ROW
            wanted = whole and self._into.wants_inner_products(p)
            if self._samples is not None:
                blocks, inner[p] = use.add_and_look(target, U, fresh, self._factored.each, wanted)
                self._samples.add(blocks)
            elif isinstance(use, MatrixUse):
                inner[p] = use.add_to(target, U, fresh, products=wanted)
            else:
                use.add_to(target, U, fresh)
                inner[p] = None
        if inner:
            self._into.filled(inner)
        if self._samples is not None:
            self._samples.note(call, used)

    def _plan(self, call: Call) -> tuple[Segments, int, int]:
        """(How rows belong to groups, numbers of a t that waits, of all that wait)."""
        key = (call.entries, call.dy.device)
        if key not in self._plans:
            limits = _LIMITS.get(call.dy.device.type, _LIMITS_ON_DEVICE)
            limits = (0, 0) if self._into.at_once else limits
            self._plans[key] = (arranged(self._factored, call), *limits)
        return self._plans[key]

    def _keep(self, p: Tensor, use: EntryUse, numbers: int, together: int) -> None:
        # One thread of autograd's serves a device, and one device's rows have segments of their
        # own, so no two threads meet in one list.
        key = id(use.segments), p.dtype
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = _Waiting(use.segments)
        elif id(p) in waiting.params or waiting.numbers + numbers > together:
            waiting.write(self._factored, self._into, self._samples)
        waiting.add(p, use, numbers)

    def finish(self) -> None:
        """Add what was kept; once, after the pass."""
        for waiting in self._waiting.values():
            waiting.write(self._factored, self._into, self._samples)
        if self._samples is not None:
            self._samples.finish()


class _Waiting:
    """Small parameters' t [entries, numel], of rows that belong to groups in one way."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._empty()

    def _empty(self) -> None:
        self.params: dict[int, Tensor] = {}
        self.numbers = 0
        self._formed: list[tuple[Tensor, Tensor]] = []
        self._factors: dict[Hashable, list[tuple[Tensor, FactorsUse]]] = {}

    def add(self, p: Tensor, use: EntryUse, numbers: int) -> None:
        """Keep what a layer adds to p."""
        self.params[id(p)] = p
        self.numbers += numbers
        if isinstance(use, FactorsUse) and use.x.numel() + use.dy.numel() <= _FEW_ROWS:
            shape = use.x.shape, use.dy.shape, use.x.dtype, use.dy.dtype
            self._factors.setdefault(shape, []).append((p, use))
        else:
            self._formed.append((p, use.t.flatten(1)))

    def write(self, factored: Factored, into: Into, samples: SampleProducts | None) -> None:
        """Hand all over."""
        if not self.params:
            return
        formed, factors = self._formed, self._factors
        self._empty()
        with plainly(self._device(formed, factors)):
            params, ts = [p for p, _ in formed], [t for _, t in formed]
            for alike in factors.values():
                params += [p for p, _ in alike]
                ts.append(_of_layers([use for _, use in alike]))
            t = ts[0] if len(ts) == 1 else torch.cat(ts, 1)
            if samples is not None:
                samples.add(products_within(self._segments.summed(t), factored.each))
            into.add_products(params, self._segments.spread(factored.coefficients, t), t)
        into.filled(dict.fromkeys(params))

    def _device(
        self,
        formed: list[tuple[Tensor, Tensor]],
        factors: dict[Hashable, list[tuple[Tensor, FactorsUse]]],
    ) -> str:
        p, _ = formed[0] if formed else next(iter(factors.values()))[0]
        return p.device.type


def _of_layers(uses: Sequence[FactorsUse]) -> Tensor:
    """[entries, layers * numel]: t of layers whose x and dY have one shape."""
    if len(uses) == 1:
        return uses[0].t.flatten(1)
    x, dy = torch.cat([use.x for use in uses]), torch.cat([use.dy for use in uses])
    t = batched_product(dy.transpose(1, 2), x)
    return t.view(len(uses), -1, t.shape[1:].numel()).transpose(0, 1).flatten(1)
