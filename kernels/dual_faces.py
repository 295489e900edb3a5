"""Every face of a simplex of m <= 3 objectives at once: one lane of a tensor of 8 per face.

With k the shortest gradient of a face and d_1, d_2 the others less g_k, D = ⟨d, d⟩, e = ⟨d, g_k⟩,
h = ⟨d, g0⟩ (at most 2 x 2, in closed form; the problem and its letters are those of solve_dual.py):

    p0 = -D^-1 e,  v = -D^-1 h        the shortest Gp on the face's plane, and the slope of f on it
    p(τ) = p0 + τ v,  τ = √(μ0 / (s² - ‖Gv‖²)),  μ0 = ‖Gp0‖²,  ‖Gp(τ)‖ = τ s
    y = b + Mq,  q = p0 / τ + v       ‖Gq‖ <= s, so min y is a lower bound of f on the simplex

Faces on which D is singular or s <= ‖Gv‖ are no candidates: f has a minimiser on their boundary
too, which is another lane. The constants mean what they do in csrc/solver/problem.hpp and
active_set.hpp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .double_double import add, divide, exact, multiply, root, subtract, where

EPS = tl.constexpr(2.220446049250313e-16)
NOISE = tl.constexpr(4 * 2.220446049250313e-16)


@triton.jit
def pick(values, index, COUNT: tl.constexpr):
    """values[index] for a tensor of indices."""
    found = values[0] + 0.0 * index
    for i in tl.static_range(1, COUNT):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def of_lane(x, lane, which):
    """The double-double at lane `which` of two tensors."""
    mine = lane == which
    return (tl.sum(tl.where(mine, x[0], 0.0)), tl.sum(tl.where(mine, x[1], 0.0)))


@triton.jit
def dot(x, y, M: tl.constexpr):
    """Σ x_i y_i of tuples of double-doubles."""
    total = multiply(x[0], y[0])
    for i in tl.static_range(1, M):
        total = add(total, multiply(x[i], y[i]))
    return total


@triton.jit
def _faces(lane, A, M: tl.constexpr):
    """Objectives k, i, j of each lane's face (k has the shortest gradient) and their number."""
    inside = (lane > 0) & (lane < 2**M)
    size = tl.where(inside, (lane & 1) + ((lane >> 1) & 1) + (lane >> 2), 0)
    low = tl.where(lane & 1 != 0, 0, tl.where(lane & 2 != 0, 1, 2))
    high = tl.where(lane & 4 != 0, 2, tl.where(lane & 2 != 0, 1, 0))
    k = tl.where(inside, low, 0)
    i = tl.where(inside, tl.where(size == 3, 1, high), 0)
    j = tl.where(inside, high, 0)
    swap = pick(A, i * (M + 1), M * M) < pick(A, k * (M + 1), M * M)
    first, second = tl.where(swap, i, k), tl.where(swap, k, i)
    swap = (size == 3) & (pick(A, j * (M + 1), M * M) < pick(A, first * (M + 1), M * M))
    return tl.where(swap, j, first), second, tl.where(swap, first, j), size


@triton.jit
def _differences(A, k, i, j, size, M: tl.constexpr):
    """D = ⟨d, d⟩ of a face, e = ⟨d, g_k⟩ and i, j such that d_1 is the longer one; the identity
    and 0 where the face has no such d.
    """
    one = exact(pick(A, k, M * M) * 0.0 + 1.0)
    zero = exact(one[1])
    kk = exact(pick(A, k * (M + 1), M * M))
    ki = exact(pick(A, k * M + i, M * M))
    kj = exact(pick(A, k * M + j, M * M))
    ij = exact(pick(A, i * M + j, M * M))
    e1, e2 = subtract(ki, kk), subtract(kj, kk)
    D11 = subtract(subtract(exact(pick(A, i * (M + 1), M * M)), ki), e1)
    D22 = subtract(subtract(exact(pick(A, j * (M + 1), M * M)), kj), e2)
    D12 = subtract(subtract(ij, ki), e2)
    pair, triple = size >= 2, size == 3
    D11, e1 = where(pair, D11, one), where(pair, e1, zero)
    D22, e2 = where(triple, D22, one), where(triple, e2, zero)
    D12 = where(triple, D12, zero)
    swap = triple & (D22[0] > D11[0])
    D11, D22 = where(swap, D22, D11), where(swap, D11, D22)
    e1, e2 = where(swap, e2, e1), where(swap, e1, e2)
    return D11, D12, D22, e1, e2, kk, tl.where(swap, j, i), tl.where(swap, i, j)


@triton.jit
def _minus_inverse(D11, ratio, pivot, D12, x, y):
    """-D^-1 (x, y) with ratio = D12 / D11 and pivot = D22 - ratio D12."""
    second = divide(subtract(multiply(ratio, x), y), pivot)
    first = divide(add(x, multiply(D12, second)), D11)
    return (-first[0], -first[1]), second


@triton.jit
def _drop_rounding(x, norm, terms):
    """0 where x is rounding of a Gram whose Gp has terms of this size."""
    size = tl.abs(x[0])
    small = (size <= EPS * 64.0) & (size * norm <= terms * EPS * 64.0)
    return where(small, exact(x[0] * 0.0), x)


@triton.jit
def _at_kink(mu0, terms, p0, shortest, s):
    """Whether Gp0 = 0 up to the rounding of the Gram, at a point of the face."""
    feasible = (p0[0][0] >= 0.0) & (p0[1][0] >= 0.0) & (p0[2][0] >= 0.0)
    small = 2.98e-8 * terms < 1e-3 * s[0]  # else f itself is rounding, and taken at face value
    noise = (mu0[0] <= terms * terms * NOISE) & feasible & small
    return noise | (mu0[0] <= 1e-28 * shortest)


@triton.jit
def solve_faces(lane, A, b, s, M: tl.constexpr):
    """Per lane: stationary p, certificate q, direction v (tuples by objective), f, and flags."""
    k, i, j, size = _faces(lane, A, M)
    D11, D12, D22, e1, e2, kk, i, j = _differences(A, k, i, j, size, M)
    b_hi, b_lo, norms = (), (), ()
    for o in tl.static_range(M):
        b_hi, b_lo = b_hi + (b[o][0],), b_lo + (b[o][1],)
        norms = norms + (tl.sqrt(A[o * (M + 1)]),)
    bk = (pick(b_hi, k, M), pick(b_lo, k, M))
    zero = exact(bk[0] * 0.0)
    h1 = where(size >= 2, subtract((pick(b_hi, i, M), pick(b_lo, i, M)), bk), zero)
    h2 = where(size == 3, subtract((pick(b_hi, j, M), pick(b_lo, j, M)), bk), zero)

    ratio = divide(D12, D11)
    pivot = subtract(D22, multiply(ratio, D12))
    ni, nj = pick(norms, i, M), pick(norms, j, M)
    regular = (D11[0] > 1e-26 * ni * ni) & (pivot[0] > 1e-26 * D22[0]) & (size > 0)
    t1, t2 = _minus_inverse(D11, ratio, pivot, D12, e1, e2)
    v1, v2 = _minus_inverse(D11, ratio, pivot, D12, h1, h2)
    mu0 = add(kk, add(multiply(e1, t1), multiply(e2, t2)))
    gv2 = add(multiply(h1, v1), multiply(h2, v2))  # -‖Gv‖²
    room = add(multiply(s, s), gv2)
    one = exact(zero[0] + 1.0)
    shortest = (subtract(subtract(one, t1), t2), t1, t2)
    slope = (subtract((-v1[0], -v1[1]), v2), v1, v2)

    nk = tl.sqrt(kk[0])
    terms = tl.abs(shortest[0][0]) * nk + tl.abs(t1[0]) * ni + tl.abs(t2[0]) * nj
    reach = tl.maximum(terms, nk)
    dropped = (_drop_rounding(shortest[0], nk, reach), _drop_rounding(t1, ni, reach),
               _drop_rounding(t2, nj, reach))  # fmt: skip
    kink = _at_kink(mu0, terms, dropped, kk[0], s)
    tau = where(kink | (room[0] <= 0.0), zero, root(divide(mu0, room)))
    inverse_tau = divide(one, where(tau[0] > 0.0, tau, one))

    p, q, v = (), (), ()
    for o in tl.static_range(M):
        role = tl.where(k == o, 0, tl.where((i == o) & (size >= 2), 1, 2))
        none = (role == 2) & ~((j == o) & (size == 3))
        start = where(role == 0, shortest[0], where(role == 1, t1, t2))
        at_kink = where(role == 0, dropped[0], where(role == 1, dropped[1], dropped[2]))
        along = where(none, zero, where(role == 0, slope[0], where(role == 1, v1, v2)))
        x = where(kink, at_kink, add(start, multiply(tau, along)))
        p = p + (where(none, zero, x),)
        x = where(kink, along, add(multiply(start, inverse_tau), along))
        q = q + (where(none, zero, x),)
        v = v + (along,)
    f = add(dot(p, b, M), multiply(multiply(s, s), tau))
    dual = regular & (room[0] > 0.0) & (kink | (tau[0] > 0.0))
    through_zero = mu0[0] <= terms * terms * NOISE
    return p, q, v, f, dual, kink, through_zero, D11, ratio, pivot, k, i, j


@triton.jit
def lowest(f, allowed, lane):
    """The lane with the smallest f among the allowed ones."""
    high = tl.where(allowed, f[0], float("inf"))
    ties = allowed & (high == tl.min(high))
    low = tl.where(ties, f[1], float("inf"))
    return tl.min(tl.where(ties & (low == tl.min(low)), lane, 8))
