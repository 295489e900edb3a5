"""`ScatteredAccumulation`: as `Accumulation`, where DTensors get their shards of the gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import from_local, is_dtensor, local
from raco_fast.distributed.processes import Processes
from raco_fast.distributed.scatter import Scatter
from raco_fast.engine.graph import ScoreGraph
from raco_fast.gradients.accumulation import Accumulation
from raco_fast.gradients.buffer_pool import HostMemory
from raco_fast.gradients.objective_grad import ObjectiveGrad, stand_in_of
from raco_fast.gradients.products_of_pass import ProductsOfPass


class ScatteredAccumulation:
    """Buffers for the gradients of one pass, beginning with what p.grad holds of them.

    Plain tensors among the parameters get this process's own gradients.

    Args:
        graph: of the pass.
        params: those whose p.grad may hold gradients already.
        memory: for buffers on the CPU.
        processes: those that train together.
        products: takes those of the shards as they arrive; None: a step takes them.
    Raises:
        RuntimeError: as `Accumulation`.
    """

    at_once = True

    def __init__(
        self,
        graph: ScoreGraph,
        params: Sequence[Tensor],
        names: tuple[str, ...],
        memory: HostMemory,
        processes: Processes,
        products: ProductsOfPass | None = None,
    ) -> None:
        self._names, self._products = names, products
        self._plain = Accumulation([p for p in params if not is_dtensor(p)], names, memory)
        self._held = {p: stand_in_of(p, names) for p in params if is_dtensor(p)}
        present = any(held is not None and held.present for held in self._held.values())
        self.is_fresh = self._plain.is_fresh and not present
        self._scatter = Scatter(len(names), graph.uses, graph.leaves, self._take, processes)

    def buffers(self, p: Tensor) -> tuple[Tensor, bool]:
        """See `engine.gradient_collector.Into`."""
        return (self._scatter if is_dtensor(p) else self._plain).buffers(p)

    def add_products(self, params: Sequence[Tensor], U: Tensor, t: Tensor) -> None:
        """See `engine.gradient_collector.Into`."""
        raise AssertionError("layers are sent one by one")

    def wants_inner_products(self, p: Tensor) -> bool:
        """Those of a shard, which arrives later."""
        return False

    def filled(self, params: Iterable[Tensor]) -> None:
        """Send what is complete."""
        self._scatter.filled(p for p in params if is_dtensor(p))

    def finish(self) -> None:
        """Wait for all that was sent."""
        self._scatter.finish()
        if self._products is not None:
            self._products.finish()

    def gradients(self) -> dict[Tensor, Tensor]:
        """Parameter -> [m, *what lies here], of those that were touched."""
        held = ((p, grad) for p, grad in self._held.items() if grad is not None and grad.present)
        shards = {p: torch.stack([local(g) for g in grad.present]) for p, grad in held}
        return self._plain.gradients() | shards

    def store(self) -> None:
        """Put everything in p.grad."""
        self._plain.store()
        for p, held in self._held.items():
            p.grad = held

    def _take(self, p: Tensor, part: Tensor) -> None:
        assert is_dtensor(p), "only DTensors are scattered here"
        held = self._held.get(p)
        if held is None:
            held = self._held[p] = ObjectiveGrad(p, self._names)
        missing = [i for i, g in enumerate(held.buffers) if g is None]
        if missing:
            # Where the shard lives, which may be the host's memory; a view would keep a pack alive.
            there = local(p)
            memory = torch.empty((len(part), *there.shape), dtype=p.dtype, device=there.device)
            memory.copy_(part)
        for i, g in enumerate(held.buffers):
            if g is None:
                held.buffers[i] = from_local(memory[i], p)
            else:
                local(g).add_(part[i].to(local(g).device))
        held.products = None
        if self._products is not None:
            self._products.complete(held)
