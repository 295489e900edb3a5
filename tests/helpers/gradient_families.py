"""Gradient sets [n, m, d] whose Gram matrices are hard in one way each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def low_rank(G: np.ndarray, rng: Any) -> np.ndarray:
    return G[..., : rng.integers(1, max(2, G.shape[1]))]


def repeated(G: np.ndarray, rng: Any) -> np.ndarray:
    m = G.shape[1]
    return G[:, rng.integers(0, rng.integers(1, m + 1), m)]


def opposite(G: np.ndarray, rng: Any) -> np.ndarray:
    """Up to three opposed pairs among the rest."""
    for k in range(0, min(6, G.shape[1] - 1), 2):
        G[:, k + 1] = -G[:, k]
    return G[:, rng.permutation(G.shape[1])]


def scaled_opposite(G: np.ndarray, rng: Any) -> np.ndarray:
    G[:, 0] = -G[:, -1] * 10.0 ** rng.uniform(-6, 6, (len(G), 1))
    return G


def zero_gradient(G: np.ndarray, rng: Any) -> np.ndarray:
    G[:, rng.integers(G.shape[1])] = 0.0
    return G[..., : rng.integers(1, G.shape[2])]


def decades(G: np.ndarray, rng: Any) -> np.ndarray:
    return G * 10.0 ** rng.uniform(-6, 6, (*G.shape[:2], 1))


def low_rank_decades(G: np.ndarray, rng: Any) -> np.ndarray:
    return decades(low_rank(G, rng), rng)


def collinear(G: np.ndarray, rng: Any) -> np.ndarray:
    return G[:, :1] + 10.0 ** rng.uniform(-12, -1, (len(G), 1, 1)) * G


def collinear_both_ways(G: np.ndarray, rng: Any) -> np.ndarray:
    return rng.choice([-1.0, 1.0], (*G.shape[:2], 1)) * collinear(G, rng)


def common_component(G: np.ndarray, rng: Any) -> np.ndarray:
    return G + 10.0 ** rng.uniform(0, 3) * rng.standard_normal((len(G), 1, G.shape[2]))


def small_integers(G: np.ndarray, rng: Any) -> np.ndarray:
    return rng.integers(-2, 3, (*G.shape[:2], rng.integers(1, 5))).astype(float)


def generic(G: np.ndarray, rng: Any) -> np.ndarray:
    return G


FAMILIES: tuple[Callable[[np.ndarray, Any], np.ndarray], ...] = (
    generic,
    low_rank,
    repeated,
    opposite,
    scaled_opposite,
    zero_gradient,
    decades,
    low_rank_decades,
    collinear,
    collinear_both_ways,
    common_component,
    small_integers,
)
