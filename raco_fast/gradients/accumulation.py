"""`Accumulation`: what a pass over all objectives adds the m gradients of its batch to."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from raco_fast.gradients.buffer_pool import HostMemory
from raco_fast.gradients.objective_grad import ObjectiveGrad, stand_in_of


class Accumulation:
    """Buffers for the gradients of some parameters, beginning with what p.grad holds of them.

    Args:
        params: those whose p.grad may hold gradients already; fresh buffers are made for others.
        memory: for buffers on the CPU.
    Raises:
        RuntimeError: p.grad was filled outside of any objective, or belongs to other ones.
    """

    def __init__(
        self, params: Sequence[Tensor], names: tuple[str, ...], memory: HostMemory
    ) -> None:
        self._names, self._memory = names, memory
        self._held = {p: stand_in_of(p, names) for p in params}
        self.is_fresh = not any(held is not None and held.present for held in self._held.values())

    def buffers(self, p: Tensor) -> tuple[Tensor, bool]:
        """See `engine.backward.Into`."""
        held = self._held.get(p)
        if held is not None and held.present:
            return held.stacked(self._memory), False
        self._held[p] = held = ObjectiveGrad(p, self._names)
        return held.allocate(self._memory), True

    def filled(self, params: Iterable[Tensor]) -> None:
        """Nothing is to be done with a layer's gradients."""

    def finish(self) -> None:
        """Nor at the end of a pass."""

    def gradients(self) -> dict[Tensor, Tensor]:
        """Parameter -> [m, *shape], of those that were touched."""
        held = ((p, grad) for p, grad in self._held.items() if grad is not None and grad.present)
        return {p: grad.stacked(self._memory) for p, grad in held}

    def store(self) -> None:
        """Put everything in p.grad."""
        for p, held in self._held.items():
            p.grad = held
