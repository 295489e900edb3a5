"""`SampleProducts`: the products that every sample of a pass has with itself.

A sample b gives the m gradients of a pass Σ_g U_ig t_g over its own groups, and what it has with
itself is Σ_gh U_ig U_jh ⟨t_g, t_h⟩ over these: blocks on the diagonal of K (`contributions.py`),
mostly of a single group. A layer that forms t_g for its gradients reads them once more while they
are in a cache; nothing of the size of a parameter is kept. Of a parameter that several calls use,
products between its uses belong to the blocks too, so those calls are kept to the end of the pass,
as for a Gram matrix.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from raco_fast.backends.transfer import sent
from raco_fast.engine.between_uses import cross_within
from raco_fast.engine.sequences import Factored, Segments
from raco_fast.engine.tap import Call


class SampleProducts:
    """Adds up the blocks over the layers.

    Args:
        factored: A = U · seeds, parted by sample.
        shared: the parameters that several calls use.
    """

    def __init__(self, factored: Factored, shared: set[Tensor]) -> None:
        assert factored.each, "groups are not parted by sample"
        self.factored, self._shared = factored, shared
        samples = factored.coefficients.shape[1] // factored.each
        self._K = torch.zeros(samples, factored.each, factored.each, dtype=torch.float64)
        self._users: dict[Tensor, list[Call]] = defaultdict(list)

    def add(self, blocks: Tensor) -> None:
        """K += [samples, each, each] of one use."""
        self._K = sent(self._K, blocks.device) + blocks

    def note(self, call: Call, used: set[Tensor]) -> None:
        """Keep a call where other calls use a parameter of its."""
        shared = used & self._shared
        if shared:
            call.keep()
        for p in shared:
            self._users[p].append(call)

    @torch.no_grad()
    def finish(self) -> None:
        """K += what two uses of one parameter have between them; once, after the pass."""
        groups, each = self.factored.coefficients.shape[1], self.factored.each
        for p, calls in self._users.items():
            for first, second in combinations(calls, 2):
                a, b = (call.rows(p, self._segments(call)) for call in (first, second))
                part = cross_within(a, b, p, groups, each)
                self.add(part + part.transpose(1, 2))
        self._users.clear()

    def _segments(self, call: Call) -> Segments:
        index, outer = call.entries
        return self.factored.segments(index, call.dy.device, outer)

    def products(self) -> Callable[[], Tensor]:
        """What gives Σ_b ⟨v_ib, v_jb⟩ of the samples' parts of the m gradients, [m, m] on the CPU.

        It waits for the device, so it is best called when a step waits in any case.
        """
        return partial(products_of_blocks, self.factored.coefficients, self._K)


def products_of_blocks(coefficients: Tensor, K: Tensor) -> Tensor:
    """Σ_gh U_ig U_jh K_gh over groups g, h of one sample: float64 [m, m] on the CPU.

    Args:
        coefficients: U [m, groups], parted by sample.
        K: [samples, each, each], on any device.
    """
    U = coefficients.view(len(coefficients), *K.shape[:2])
    M = torch.einsum("isa,sab,jsb->ij", U, K.cpu(), U)
    return (M + M.T) / 2


def blocks_of(K: Tensor, each: int) -> Tensor:
    """[groups / each, each, each]: the blocks on the diagonal of K [groups, groups]."""
    samples = len(K) // each
    return K.view(samples, each, samples, each).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
