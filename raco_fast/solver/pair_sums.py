"""`PairSums`: what some pairs' gradients sum to, and the Gram matrices of batches of any size.

With H the Gram matrix of the expected gradients (`u_statistic.py`) and P_ij the mean of
⟨v_ib, v_jb⟩ over the pairs b labelled for both, a batch of n pairs, of which the shares f_i and
f_ij are labelled for i and for both, has on average

    M(n) = H + D / n,    D_ij = f_ij / (f_i f_j) (P_ij - H_ij)

with as many labels as are expected of n pairs. D is the noise: of one objective, D_ii is the
variance of a labelled pair's gradient, tr Σ_i, over f_i.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from raco_fast.solver.u_statistic import SampleSums

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PairSums:
    """Sums over some pairs, each a sample. A pair without a label has a gradient of zero.

    Args:
        gram: [m, m], of the summed gradients, ⟨Σ_b v_ib, Σ_b v_jb⟩.
        products: [m, m], Σ_b ⟨v_ib, v_jb⟩.
        counts: [m], labelled pairs.
        common: [m, m], pairs labelled for both.
        pairs: how many there are, labelled or not.
    """

    gram: Array
    products: Array
    counts: Array
    common: Array
    pairs: int

    def without(self, block: "PairSums", with_block: Array) -> "PairSums":
        """Those of the other pairs.

        Args:
            block: of some of these pairs.
            with_block: [m, m], products of the block's sums (rows) with all (columns).
        """
        return PairSums(
            self.gram - with_block - with_block.T + block.gram,
            self.products - block.products,
            self.counts - block.counts,
            self.common - block.common,
            self.pairs - block.pairs,
        )

    def of(self, places: list[int]) -> "PairSums":
        """Those of some objectives."""
        among = np.ix_(places, places)
        matrices = self.gram[among], self.products[among]
        return PairSums(*matrices, self.counts[places], self.common[among], self.pairs)

    @cached_property
    def expected(self) -> Array:
        """H [m, m]; NaN for an entry that does not exist."""
        whole = np.outer(self.counts, self.counts)
        own = _over(self.products, whole)
        sums = SampleSums(own, self.counts, self.common, self.pairs)
        return sums.unbiased(_over(self.gram, whole))

    @cached_property
    def noise(self) -> Array:
        """D [m, m]."""
        whole = np.outer(self.counts, self.counts)
        excess = _over(self.products, self.common) - self.expected
        share = self.pairs * _over(self.common, whole)
        return np.where(self.common > 0, share * excess, np.where(np.isnan(excess), np.nan, 0.0))

    @property
    def noise_of_a_pair(self) -> Array:
        """[m], tr Σ_i: the variance of a labelled pair's gradient."""
        return np.asarray(np.diagonal(self.noise) * self.counts / self.pairs)

    def of_batches(self, n: float) -> Array:
        """M(n) [m, m], that of a batch of n pairs on average."""
        return self.expected + self.noise / n


def _over(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
