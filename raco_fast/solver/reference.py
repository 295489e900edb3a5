"""Algorithm 1 of the paper in plain numpy: the twin of csrc/solver, for reading and for tests.

    p*            = argmin over the simplex of f(p) = b'p + s sqrt(p'Mp),  b = Mw, s = c ||g0||
    p_clipped     = min(p*, w)
    coefficients  = w + (s / ||G p_clipped||) p_clipped

The simplex has 2^m - 1 faces. Inside the right one, p* is a stationary point of f: there a
multiplier nu has b + (s / ||Gp||) M p = nu 1, so p = x0 + tau d is a line in tau = ||Gp|| / s, with

    [M 1; 1' 0] (x0, .) = (0, 1),     [M 1; 1' 0] (d, .) = (-b, 0),     ||G(x0 + tau d)|| = s tau.

M x0 is constant, so <Gx0, Gd> = 0 and tau = ||Gx0|| / sqrt(s^2 - ||Gd||^2). All faces are tried and
the lowest f wins: a different method from the C++ solver's active set, and fit for m <= 6. Where
gradients are dependent it finds one of the minimisers, not always the one closest to w.
Source: arXiv 2602.02495, Algorithm 1, lines 6-8.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def coefficients(gram: Array, weights: Array, c: float, rule: str = "cagrad-clip") -> Array:
    """[m] coefficients of the update; arguments as for `solve_dual`, one Gram matrix [m, m]."""
    if rule == "linear":
        return weights
    p = minimiser(gram, weights, c, rule)
    if rule == "mgda":
        return p
    clipped = np.minimum(p, weights) if rule == "cagrad-clip" else p  # line 7
    length, s = norm(gram, clipped), c * norm(gram, weights)
    return weights + s / length * clipped if length > 0.0 else weights  # line 8


def minimiser(gram: Array, weights: Array, c: float, rule: str) -> Array:
    """[m] p*, line 6: the best stationary point of all faces; the weights where g0 = 0."""
    mgda = rule == "mgda"
    b = np.zeros_like(weights) if mgda else gram @ weights
    s = 1.0 if mgda else c * norm(gram, weights)
    if s == 0.0 and not b.any():
        return weights
    return min(points(gram, b, s), key=lambda p: b @ p + s * norm(gram, p))


def points(gram: Array, b: Array, s: float) -> Iterator[Array]:
    """The stationary point of f on each face of the simplex that has one."""
    m = len(b)
    for size in range(1, m + 1):
        for face in map(list, combinations(range(m), size)):
            M = gram[np.ix_(face, face)]
            system = np.block([[M, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            right = np.zeros((size + 1, 2))
            right[size, 0], right[:size, 1] = 1.0, -b[face]
            x0, d = np.linalg.lstsq(system, right, rcond=1e-13)[0][:size].T
            room = s**2 - norm(M, d) ** 2
            x = x0 + norm(M, x0) / np.sqrt(room) * d if room > 0.0 else x0
            if x.min() >= -1e-12 and abs(x.sum() - 1.0) < 1e-9:
                p = np.zeros(m)
                p[face] = np.maximum(x, 0.0)
                yield p


def norm(gram: Array, x: Array) -> float:
    """||Gx|| = sqrt(x'Mx), and 0 where that is rounding of its own terms."""
    square, terms = x @ gram @ x, np.abs(x) @ np.sqrt(np.diag(gram))
    return float(np.sqrt(square)) if square > 1e-15 * terms**2 else 0.0
