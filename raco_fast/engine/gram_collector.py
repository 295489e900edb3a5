"""`GramCollector`: the Gram matrix of m gradients from one backward pass, without the gradients.

Every layer adds its K_gh = ⟨t_g, t_h⟩ (`contributions.py`); M = U K Uᵀ. A parameter that several
calls use also needs the products between its uses, so those calls are kept to the end of the pass;
`keep` keeps every call, so that G0 can be formed from them once the coefficients are known.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from raco_fast.backends.transfer import sent
from raco_fast.engine.between_uses import cross
from raco_fast.engine.contributions import Use
from raco_fast.engine.gradient_collector import arranged
from raco_fast.engine.sample_products import blocks_of, products_of_blocks
from raco_fast.engine.sequences import Factored
from raco_fast.engine.tap import Call


class GramCollector:
    """Adds up K over the layers; keeps the calls that are needed again.

    Args:
        factored: A = U · seeds.
        wanted: the parameters whose gradients count.
        shared: those that several calls use, so that products between their uses count as well.
        keep: keep every call, for `combine`.
        apart: keep each parameter's K as well, for `grams`.
    """

    def __init__(
        self,
        factored: Factored,
        wanted: Sequence[Tensor],
        shared: set[Tensor],
        *,
        keep: bool = False,
        apart: bool = False,
    ) -> None:
        self.factored = factored
        self._wanted, self._shared = set(wanted), shared
        self._keep, self._apart = keep, apart
        groups = factored.coefficients.shape[1]
        self._K = torch.zeros(groups, groups, dtype=torch.float64)
        self._K_of: dict[Tensor, Tensor] = {}
        self._calls: list[Call] = []
        self._users: dict[Tensor, list[Call]] = defaultdict(list)

    def collect(self, call: Call) -> None:
        """K += ⟨t_g, t_h⟩ of the parameters of one layer."""
        used = set()
        for p, _, use in call.uses(arranged(self.factored, call)):
            if p in self._wanted:
                self._add(p, use.gram())
                used.add(p)
        shared = used & self._shared
        if shared or (self._keep and used):
            call.keep()
        for p in shared:
            self._users[p].append(call)
        if self._keep and used:
            self._calls.append(call)

    def _add(self, p: Tensor, K: Tensor) -> None:
        self._K = sent(self._K, K.device) + K
        if self._apart:
            self._K_of[p] = self._K_of[p] + K if p in self._K_of else K

    @torch.no_grad()
    def add_products_of_uses(self) -> None:
        """K += what two uses of one parameter have between them; once, after the pass."""
        for p, calls in self._users.items():
            for first, second in combinations(calls, 2):
                a, b = (call.rows(p, arranged(self.factored, call)) for call in (first, second))
                part = cross(a, b, p, len(self._K))
                self._add(p, part + part.T)
        self._users.clear()

    def gram(self) -> Tensor:
        """M = U K Uᵀ, float64 [m, m] on the CPU."""
        return self._of_objectives(self._K)

    def sample_products(self) -> Callable[[], Tensor]:
        """As `SampleProducts.products`; the groups have to be parted by sample."""
        blocks = blocks_of(self._K, self.factored.each)
        return partial(products_of_blocks, self.factored.coefficients, blocks)

    def grams(self) -> dict[Tensor, Tensor]:
        """Each parameter's part of M, where they were kept apart."""
        alike: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        for p, K in self._K_of.items():
            alike[K.device].append(p)
        found: dict[Tensor, Tensor] = {}
        for params in alike.values():
            K = torch.stack([self._K_of[p] for p in params])  # one copy to the host
            found.update(zip(params, self._of_objectives(K), strict=True))
        return found

    def _of_objectives(self, K: Tensor) -> Tensor:
        U = self.factored.coefficients
        M = U @ K.cpu() @ U.T
        return (M + M.mT) / 2

    @torch.no_grad()
    def combine(self, coefficients: Tensor, on_gradient: Callable[[Tensor], None] | None) -> None:
        """p.grad = Σ_g (αᵀU)_g t_g, one product per layer."""
        U = (coefficients @ self.factored.coefficients)[None]
        for call in self._calls:
            uses = call.uses(arranged(self.factored, call))
            for p in _add_gradients(uses, self._wanted, U) - self._shared:
                hand_over_gradient(p, on_gradient)
        for p in self._shared:
            if p.grad is not None:
                hand_over_gradient(p, on_gradient)
        self._calls.clear()


def _add_gradients(
    uses: Iterable[tuple[Tensor, slice, Use]], wanted: Container[Tensor], U: Tensor | None
) -> set[Tensor]:
    """p.grad += Σ_g U_g t_g for the wanted parameters of one layer, which are returned."""
    fresh: dict[Tensor, bool] = {}
    for p, rows, use in uses:
        if p in wanted:
            fresh.setdefault(p, p.grad is None)
            if p.grad is None:
                p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
            use.add_to(p.grad[None, rows], U, fresh[p])
    return set(fresh)


def hand_over_gradient(p: Tensor, on_gradient: Callable[[Tensor], None] | None) -> None:
    """Give a parameter whose p.grad is complete to `on_gradient`, if there is one, and free it."""
    if on_gradient is not None:
        on_gradient(p)
        p.grad = None
