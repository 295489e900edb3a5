"""`Products`: the inner products of one parameter's m gradients, taken when those were written.

The Gram matrix of a step is their sum over the parameters. Taken while a layer's gradients are
still in a cache, they spare the step a reading of all of them; the bits are the same, so that it
does not matter which step found which products kept.

Products that no longer fit would be silently wrong, so they are used only for the very tensors that
they were taken of, at the same address and of the same version, the count that torch adds one to
whenever a tensor is written. What that count does not show drops them instead:

    zeroing and GradScaler's unscaling of a stand-in   `ObjectiveGrad` drops them
    gradients that somebody else holds                 none are kept: `.data`, a numpy array or
                                                       DLPack write without a count
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.backends.choose import forced
from raco_fast.backends.plan import Plan
from raco_fast.distributed.dtensor import local
from raco_fast.gradients.objective_grad import ObjectiveGrad

# Bytes of gradients whose products are taken together, where they have to be read for them: enough
# for a call (20 us) not to count, and few enough to be in a cache still if it is a large one.
_TOGETHER = 2 << 20


class Products(NamedTuple):
    """⟨g_i, g_j⟩ of one parameter, and what they were taken of.

    Attributes:
        values: [m, m] float64 on the CPU.
        backend: which one was forced when they were taken.
        buffers: the m gradients.
        marks: their addresses and versions.
    """

    values: Tensor
    backend: str | None
    buffers: tuple[Tensor, ...]
    marks: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, held: ObjectiveGrad, values: Tensor) -> "Products":
        """Those of what the buffers hold now."""
        buffers = tuple(held.present)
        return cls(values, forced(), buffers, tuple(map(_mark, buffers)))

    def are_of(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these are the same gradients, and nobody has written to them since."""
        for g, of_before, mark in zip(gradients, self.buffers, self.marks, strict=True):
            if g is not of_before or _mark(g) != mark:
                return False
        return self.backend == forced()


def _mark(g: Tensor) -> tuple[int, int, int]:
    """What changes when a gradient is written: of a DTensor, by itself or by its local part."""
    part = local(g)
    return part.data_ptr(), part._version, g._version


class ProductsOfPass:
    """Takes the products of what a pass over all objectives writes, a few megabytes at a time.

    Args:
        uses: how many layers add to each parameter's gradients; the last one completes them.
        plan: of these operations.
    """

    def __init__(self, uses: Mapping[Tensor, int], plan: Plan) -> None:
        self._left, self._plan = dict(uses), plan
        self._waiting: list[ObjectiveGrad] = []
        self._bytes = 0

    def completed_by_next(self, p: Tensor) -> bool:
        """Whether the next layer that adds to p's gradients completes them."""
        return self._left[p] == 1

    def filled(self, p: Tensor, held: ObjectiveGrad, values: Tensor | None) -> None:
        """Note that one layer has added what it has for p; `values`: the products, if known."""
        self._left[p] -= 1
        if self._left[p] == 0:
            self.complete(held, values)

    def complete(self, held: ObjectiveGrad, values: Tensor | None = None) -> None:
        """Keep the products of gradients that are complete; those not known are taken soon."""
        if held.escaped or held.device.type != "cpu" or len(held.present) < len(held.buffers):
            return
        if values is not None:
            held.products = Products.of(held, values)
            return
        self._waiting.append(held)
        self._bytes += sum(local(g).nbytes for g in held.present)
        if self._bytes >= _TOGETHER:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Take what waits."""
        if not self._waiting:
            return
        columns = zip(*(held.buffers for held in self._waiting), strict=True)
        lists = [[None if g is None else local(g) for g in one] for one in columns]
        for held, values in zip(self._waiting, ops.products(lists, self._plan), strict=True):
            held.products = Products.of(held, values)
        self._waiting.clear()
        self._bytes = 0


def known_products(
    params: Iterable[Tensor], grads: Sequence[Sequence[Tensor | None]]
) -> list[Tensor | None]:
    """The products of each parameter's gradients where they were kept and still fit, else None.

    Args:
        params: n parameters, whose p.grad may have kept some.
        grads: m lists of the n gradients that a step takes.
    """
    found: list[Tensor | None] = []
    for p, column in zip(params, zip(*grads, strict=True), strict=True):
        kept = p.grad.products if type(p.grad) is ObjectiveGrad else None
        found.append(kept.values if kept is not None and kept.are_of(column) else None)
    return found
