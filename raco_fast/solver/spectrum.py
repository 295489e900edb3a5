"""Powers of a singular matrix: H = V diag(λ) V', and what is rounding of it left out."""

import numpy as np

from raco_fast.solver.rule import Array, Mask


def decomposed(H: Array) -> tuple[Array, Array, Mask]:
    """(λ [.., m] ascending, V [.., m, m], kept [.., m]) with λ_k > 8 m ε λ_max where kept."""
    values, V = np.linalg.eigh(H)
    kept = values > 8.0 * H.shape[-1] * np.finfo(float).eps * values[..., -1:]
    return np.where(kept, values, 0.0), V, kept


def inverse_power(H: Array, exponent: float, x: Array) -> Array:
    """[.., m] V λ^-exponent V'x over the eigenvalues that are kept; a part of x that is rounding of
    it is 0.
    """
    values, V, kept = decomposed(H)
    y = np.einsum("...ik,...i->...k", V, x)
    least = 8.0 * H.shape[-1] * np.finfo(float).eps * np.linalg.norm(x, axis=-1, keepdims=True)
    kept = kept & (abs(y) > least)
    scaled = np.where(kept, np.where(kept, values, 1.0) ** -exponent * y, 0.0)
    return np.asarray(np.einsum("...ik,...k->...i", V, scaled))
