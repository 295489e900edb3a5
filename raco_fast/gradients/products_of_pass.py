"""`ProductsOfPass`: keeps the products of the gradients that a pass over all objectives writes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.backends.plan import Plan
from raco_fast.distributed.dtensor import local
from raco_fast.gradients.objective_grad import ObjectiveGrad
from raco_fast.gradients.products import Products

# Bytes of gradients whose products are taken together, where they have to be read for them: enough
# for a call (20 us) not to count, and few enough to be in a cache still if it is a large one.
_TOGETHER = 2 << 20


class ProductsOfPass:
    """Takes the products of what a pass over all objectives writes, a few megabytes at a time.

    On a GPU those are kept that the kernel of a layer has on the way, in every pass: whether there
    are any is then a matter of this step's passes alone, and a resumed run has the bits of one that
    was not interrupted. On the CPU, whose bits do not depend on it, the last pass takes them.

    Args:
        uses: how many layers add to each parameter's gradients; the last one completes them.
        plan: of these operations.
        last: whether a step is expected to follow.
    """

    def __init__(self, uses: Mapping[Tensor, int], plan: Plan, last: bool) -> None:
        self._left, self._plan, self._last = dict(uses), plan, last
        self._waiting: list[ObjectiveGrad] = []
        self._bytes = 0

    def completed_by_next(self, p: Tensor) -> bool:
        """Whether the next layer that adds to p's gradients completes them, and they are wanted."""
        return self._left[p] == 1 and (self._last or not p.is_cpu)

    def filled(self, p: Tensor, held: ObjectiveGrad, values: Tensor | None) -> None:
        """Note that one layer has added what it has for p; `values`: the products, if known."""
        self._left[p] -= 1
        if self._left[p] == 0:
            self.complete(held, values)

    def complete(self, held: ObjectiveGrad, values: Tensor | None = None) -> None:
        """Keep the products of gradients that are complete; those not known are taken soon."""
        if held.escaped or len(held.present) < len(held.buffers):
            return
        if values is not None:
            held.products = Products.of(held.present, values)
        elif self._last and held.device.type == "cpu":
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
            held.products = Products.of(held.present, values)
        self._waiting.clear()
        self._bytes = 0
