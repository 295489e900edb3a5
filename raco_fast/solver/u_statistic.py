"""The Gram matrix of the expected gradients, from one batch: a U-statistic over its samples.

The gradients of a step are means over samples, g_i = (1/n_i) Σ_b v_ib, of which each sample b has
v_ib for the objectives that it is labelled for. Products of two different samples are unbiased,
E⟨v_ib, v_jc⟩ = ⟨E g_i, E g_j⟩; a sample's products with itself are not, and the Gram matrix M of
the batch holds both. With C_ij = Σ_b ⟨v_ib, v_jb⟩ / (n_i n_j), the part of M that samples have with
themselves, and n_ij samples that both objectives are labelled for,

    H_ij = (M_ij - C_ij) n_i n_j / (n_i n_j - n_ij)

is the mean over all pairs of different samples. It exists where there is such a pair.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SampleSums:
    """What the samples of a step have with themselves; sums over micro-batches and processes.

    Args:
        products: C, [m, m] float64, in the unit of the step's Gram matrix.
        counts: [m], n_i: how many labelled samples there are, each as often as it weighs.
        common: [m, m], Σ over samples of their weights for i times those for j.
        samples: how many there are, labelled or not.
    """

    products: Array
    counts: Array
    common: Array
    samples: int

    def unbiased(self, gram: Array) -> Array:
        """H [m, m] of the batch's M; NaN for an entry that does not exist.

        M and C are float64 sums of float32 products, and what is left of M loses as many digits as
        M/H has: with noise of a thousand times the signal, H still has three.
        """
        whole = np.outer(self.counts, self.counts)
        pairs = whole - self.common
        # Weights are whole numbers, or sums of a few fractions.
        exists = pairs > 1e-9 * whole
        ratio = np.divide(whole, pairs, out=np.full_like(whole, np.nan), where=exists)
        return np.asarray((gram - self.products) * ratio)
