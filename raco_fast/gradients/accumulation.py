"""`Accumulation`: what a pass over all objectives adds the m gradients of its batch to."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from raco_fast.gradients.buffer_pool import HostMemory
from raco_fast.gradients.objective_grad import ObjectiveGrad, stand_in_of
from raco_fast.gradients.products_of_pass import ProductsOfPass


class Accumulation:
    """Buffers for the gradients of some parameters, beginning with what p.grad holds of them.

    Args:
        params: those whose p.grad may hold gradients already; fresh buffers are made for others.
        memory: for buffers on the CPU.
        products: takes those of the gradients as they are completed; None: a step takes them.
    Raises:
        RuntimeError: p.grad was filled outside of any objective, or belongs to other ones.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        names: tuple[str, ...],
        memory: HostMemory,
        products: ProductsOfPass | None = None,
    ) -> None:
        self._names, self._memory, self._products = names, memory, products
        self._held = {p: stand_in_of(p, names) for p in params}
        self.is_fresh = not any(held is not None and held.present for held in self._held.values())

    def buffers(self, p: Tensor) -> tuple[Tensor, bool]:
        """See `engine.backward.Into`."""
        held = self._held.get(p)
        if held is not None and held.present:
            held.products = None
            return held.stacked(self._memory), False
        self._held[p] = held = ObjectiveGrad(p, self._names)
        return held.allocate(self._memory), True

    def wants_products(self, p: Tensor) -> bool:
        """See `engine.backward.Into`."""
        return self._products is not None and self._products.completed_by_next(p)

    def filled(self, params: Mapping[Tensor, Tensor | None]) -> None:
        """See `engine.backward.Into`."""
        if self._products is not None:
            for p, values in params.items():
                held = self._held[p]
                assert held is not None, "filled before it had buffers"
                self._products.filled(p, held, values)

    def finish(self) -> None:
        """See `engine.backward.Into`."""
        if self._products is not None:
            self._products.finish()

    def gradients(self) -> dict[Tensor, Tensor]:
        """Parameter -> [m, *shape], of those that were touched."""
        held = ((p, grad) for p, grad in self._held.items() if grad is not None and grad.present)
        return {p: grad.stacked(self._memory) for p, grad in held}

    def store(self) -> None:
        """Put everything in p.grad."""
        for p, held in self._held.items():
            p.grad = held
