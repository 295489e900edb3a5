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

Two clips of our own: "inside" looks for p* among p <= kappa w, and leaves it at that; a face has
then a part of the objectives at their caps u too, and x0 solves the system with (-M u, 1 - 1'u) on
the right. "smooth" takes p_clipped = (p*^-q + w^-q)^(-1/q).
"""

from collections.abc import Iterable, Iterator
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def coefficients(
    gram: Array,
    weights: Array,
    c: float,
    rule: str = "cagrad-clip",
    clip: str = "after",
    option: float = np.inf,
) -> Array:
    """[m] coefficients of the update; arguments as for `solve_dual`, one Gram matrix [m, m].

    `option`: kappa of the clip "inside", q of "smooth".
    """
    if rule == "linear":
        return weights
    p = minimiser(gram, weights, c, rule, option if clip == "inside" else np.inf)
    if rule == "mgda":
        return p
    clipped = np.minimum(p, weights) if rule == "cagrad-clip" and clip == "after" else p  # line 7
    if clip == "smooth":
        clipped = smooth_min(p, weights, option)
    length, s = norm(gram, clipped), c * norm(gram, weights)
    return weights + s / length * clipped if length > 0.0 else weights  # line 8


def smooth_min(p: Array, w: Array, q: float) -> Array:
    """(p^-q + w^-q)^(-1/q), and 0 where p or w is."""
    with np.errstate(divide="ignore"):
        logarithms = np.logaddexp(-q * np.log(p), -q * np.log(w)) / q
    return np.exp(-logarithms)


def minimiser(gram: Array, weights: Array, c: float, rule: str, kappa: float = np.inf) -> Array:
    """[m] p*, line 6: the best stationary point of all faces; the weights where g0 = 0."""
    mgda, gram = rule == "mgda", gram / (gram.diagonal().max() or 1.0)  # the scale does not matter
    b = np.zeros_like(weights) if mgda else gram @ weights
    s = 1.0 if mgda else c * norm(gram, weights)
    if s == 0.0 and not b.any():
        return weights
    caps = np.ones_like(weights) if np.isinf(kappa) else np.minimum(kappa * weights, 1.0)
    capped = [()] if np.isinf(kappa) else subsets(range(len(b)))
    found = (p for full in capped for p in points(gram, b, s, caps, list(full)))
    return min(found, key=lambda p: b @ p + s * norm(gram, p))


def subsets(items: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Every subset, the empty one first."""
    known = list(items)
    return chain.from_iterable(combinations(known, size) for size in range(len(known) + 1))


def points(gram: Array, b: Array, s: float, caps: Array, full: list[int]) -> Iterator[Array]:
    """The stationary point of f, if any, on each face where `full` have what their caps allow."""
    u = np.zeros_like(b)
    u[full] = caps[full]
    rest = 1.0 - u.sum()
    if rest <= 1e-15:
        if rest >= -1e-12:
            yield u
        return
    for face in map(list, subsets(set(range(len(b))) - set(full))):
        size = len(face)
        system = np.zeros((size + 1, size + 1))
        system[:size, :size], system[size, :size] = gram[np.ix_(face, face)], 1.0
        system[:size, size] = 1.0
        right = np.zeros((size + 1, 2))
        right[:size, 0], right[size, 0], right[:size, 1] = -(gram @ u)[face], rest, -b[face]
        p, d = u.copy(), np.zeros_like(b)
        p[face], d[face] = np.linalg.lstsq(system, right, rcond=1e-13)[0][:size].T
        room = s**2 - norm(gram, d) ** 2
        if room > 0.0:
            p = p + norm(gram, p) / np.sqrt(room) * d
        if p.min() >= -1e-12 and (p <= caps + 1e-12).all() and abs(p.sum() - 1.0) < 1e-9:
            yield np.clip(p, 0.0, caps)


def norm(gram: Array, x: Array) -> float:
    """||Gx|| = sqrt(x'Mx), and 0 where that is rounding of its own terms."""
    square, terms = x @ gram @ x, np.abs(x) @ np.sqrt(np.diag(gram))
    return float(np.sqrt(square)) if square > 1e-15 * terms**2 else 0.0
