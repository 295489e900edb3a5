"""`Accumulation`: what a pass over all objectives adds the m gradients of its batch to."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from raco_fast.gradients.buffer_pool import HostMemory, empty
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

    at_once = False

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
        """See `engine.gradient_collector.Into`."""
        held = self._held.get(p)
        if held is not None and held.present:
            held.products = None
            return held.stacked(self._memory), False
        self._held[p] = held = ObjectiveGrad(p, self._names)
        return held.allocate(self._memory), True

    def add_products(self, params: Sequence[Tensor], U: Tensor, t: Tensor) -> None:
        """See `engine.gradient_collector.Into`."""
        dtype, held = params[0].dtype, [self._held.get(p) for p in params]
        adds = any(grad is not None and grad.present for grad in held)
        sums = self._product(U, t, t.dtype if adds else dtype)
        targets: list[Tensor] = []
        added: list[Tensor] = []
        rows = (_unflatten_dense_tensors(row, params) for row in sums)  # type: ignore[no-untyped-call]
        parts = zip(*rows, strict=True)
        for p, grad, of_p in zip(params, held, parts, strict=True):
            if grad is not None and grad.present:
                grad.products = None
                targets += grad.stacked(self._memory).unbind()
                added += of_p
            else:
                self._held[p] = grad = ObjectiveGrad(p, self._names)
                grad.buffers = [part.to(dtype) for part in of_p] if adds else [*of_p]
        if targets and dtype == t.dtype:
            torch._foreach_add_(targets, added)
        elif targets:
            # Added before rounding: the sum is rounded once, as autograd's accumulation does.
            torch._foreach_add_(added, targets)
            torch._foreach_copy_(targets, added)

    def _product(self, U: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """U t, rounded once, on memory that is kept from step to step."""
        out = empty((len(U), t.shape[1]), dtype, t.device, self._memory)
        return torch.mm(U, t, out=out) if dtype == t.dtype else out.copy_(U @ t)

    def wants_inner_products(self, p: Tensor) -> bool:
        """See `engine.gradient_collector.Into`."""
        return self._products is not None and self._products.completed_by_next(p)

    def filled(self, params: Mapping[Tensor, Tensor | None]) -> None:
        """See `engine.gradient_collector.Into`."""
        if self._products is not None:
            for p, values in params.items():
                held = self._held[p]
                assert held is not None, "filled before it had buffers"
                self._products.filled(p, held, values)

    def finish(self) -> None:
        """See `engine.gradient_collector.Into`."""
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
