"""`ScatteredGram`: the Gram matrix of averages over processes, without anybody's m gradients."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.distributed.processes import Processes
from raco_fast.distributed.scatter import Scatter, counted
from raco_fast.engine.graph import ScoreGraph


class ScatteredGram:
    """What the gradients of a pass are added to, one layer at a time; only products are kept.

    The Gram matrix of averages has products between processes, so every layer's m gradients are
    summed over them in parts; a part's products are taken, and it is dropped.

    Args:
        graph: of the pass.
        m: the number of objectives.
        processes: those that train together.
        look: also shown every (parameter, [m, *part]), as spot checks need it.
    """

    at_once = True

    def __init__(
        self,
        graph: ScoreGraph,
        m: int,
        processes: Processes,
        look: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self._processes, self._look = processes, look
        self._M = torch.zeros(m, m, dtype=torch.float64)
        self._scatter = Scatter(m, graph.uses, graph.leaves, self._take, processes)
        self.buffers = self._scatter.buffers
        self.finish = self._scatter.finish

    def add_products(self, params: Sequence[Tensor], U: Tensor, t: Tensor) -> None:
        """See `engine.gradient_collector.Into`."""
        raise AssertionError("layers are sent one by one")

    def wants_inner_products(self, p: Tensor) -> bool:
        """Those of the sums over processes, which arrive later."""
        return False

    def filled(self, params: Iterable[Tensor]) -> None:
        """See `engine.gradient_collector.Into`."""
        self._scatter.filled(params)

    def gram(self) -> Tensor:
        """M, float64 [m, m] on the CPU, the same bits on all processes."""
        return ops.within_cauchy_schwarz(self._processes.sum(self._M).cpu())

    def _take(self, p: Tensor, part: Tensor) -> None:
        if self._look is not None:
            self._look(p, part)
        products = ops.gram_where_it_is([[g] for g in part])
        self._M = self._M.to(products.device) + counted(p, self._processes) * products
