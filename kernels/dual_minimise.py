"""The minimiser of the dual problem that is closest to w, from the candidates of dual_faces.py.

Gp is unique, p is not when gradients are dependent. With m <= 3 the minimisers form a segment
p + t d (Gd = 0, or Gd along Gp where f* = 0), on which w is projected, or with identical gradients
the whole simplex, where the answer is w itself. Formulas: csrc/solver/projection.hpp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .double_double import add, divide, exact, multiply, product, root, subtract, where
from .dual_faces import EPS, NOISE, dot, lowest, of_lane, pick, solve_faces

NOTHING = tl.constexpr(1e-26)


@triton.jit
def norm_or_zero(A, x, M: tl.constexpr):
    """‖Gx‖ for a float64 x; 0 where it is rounding of A, the terms of the sum."""
    square = product(A[0] * 0.0, A[0])
    terms = A[0] * 0.0
    for i in tl.static_range(M):
        terms += tl.abs(x[i]) * tl.sqrt(A[i * M + i])
        row = product(A[i * M], x[0])
        for j in tl.static_range(1, M):
            row = add(row, product(A[i * M + j], x[j]))
        square = add(square, multiply(exact(x[i]), row))
    norm = root(square)
    return where(square[0] <= terms * terms * NOISE, exact(norm[0] * 0.0), norm)


@triton.jit
def value_of(A, b, s, p, M: tl.constexpr):
    """f(p) for p rounded to float64."""
    total = multiply(s, norm_or_zero(A, p, M))
    for i in tl.static_range(M):
        total = add(total, multiply(b[i], exact(p[i])))
    return total


@triton.jit
def _project(p, d, w, low, high, M: tl.constexpr):
    """The point of {p + t d >= 0, low <= t <= high} that is closest to w; p where d is 0."""
    along = exact(p[0][0] * 0.0)
    length2 = along
    for i in tl.static_range(M):
        along = add(along, multiply(d[i], subtract(w[i], p[i])))
        length2 = add(length2, multiply(d[i], d[i]))
        bound = -p[i][0] / tl.where(d[i][0] == 0.0, 1.0, d[i][0])
        low = tl.where(d[i][0] > 0.0, tl.maximum(low, bound), low)
        high = tl.where(d[i][0] < 0.0, tl.minimum(high, bound), high)
    move = length2[0] > 0.0
    t = divide(along, where(move, length2, exact(length2[0] * 0.0 + 1.0)))
    t = where(t[0] < low, exact(low), where(t[0] > high, exact(high), t))
    found = ()
    total = exact(length2[0] * 0.0)
    for i in tl.static_range(M):
        x = where(move, add(p[i], multiply(t, d[i])), p[i])
        # What a bound in float64 leaves of a coordinate that it makes zero.
        x = where(x[0] < tl.abs(t[0] * d[i][0]) * EPS * 4.0, exact(x[0] * 0.0), x)
        found = found + (x,)
        total = add(total, x)
    scaled = ()
    for i in tl.static_range(M):
        scaled = scaled + (divide(found[i], total),)
    return scaled


@triton.jit
def _null_direction(D11, ratio, pivot, k, i, j, count, norms, null, M: tl.constexpr):
    """d with 1'd = 0 and Gd = 0 on a face of `count` objectives, 0 where there is none; and whether
    all of its gradients are one.
    """
    nk, ni, nj = pick(norms, k, M), pick(norms, i, M), pick(norms, j, M)
    twins = D11[0] <= (nk + ni) * (nk + ni) * null
    terms = tl.abs(ratio[0] - 1.0) * nk + tl.abs(ratio[0]) * ni + nj
    line = (count == 3) & (pivot[0] <= terms * terms * null) & ~twins
    one, zero = exact(nk * 0.0 + 1.0), exact(nk * 0.0)
    d = ()
    for o in tl.static_range(M):
        of_line = where(k == o, subtract(ratio, one), where(i == o, (-ratio[0], -ratio[1]), one))
        of_pair = where(k == o, (-one[0], one[1]), where(i == o, one, zero))
        x = where(line, of_line, where((count == 2) & twins, of_pair, zero))
        d = d + (x,)
    return d, (count == 3) & twins


@triton.jit
def minimise(A, b, s, scale, linear_term, w, M: tl.constexpr):
    """The minimiser of f closest to w, a lower bound of f, for s > 0 (tuples of double-doubles)."""
    lane = tl.arange(0, 8)
    found = solve_faces(lane, A, b, s, M)
    ps, qs, vs, f, dual = found[0], found[1], found[2], found[3], found[4]
    allowed = dual
    lower = exact(f[0] * 0.0 + float("inf"))
    norms, ys = (), ()
    slack = f[0] * 0.0 + scale
    for o in tl.static_range(M):
        norms = norms + (tl.sqrt(A[o * (M + 1)]),)
        allowed = allowed & (ps[o][0] >= 0.0)
        slack += tl.abs(qs[o][0]) * norms[o]
        y = b[o]
        for r in tl.static_range(M):
            y = add(y, multiply(exact(A[o * M + r]), qs[r]))
        ys = ys + (y,)
        lower = where((y[0] < lower[0]) | ((y[0] == lower[0]) & (y[1] < lower[1])), y, lower)
    best = lowest(f, allowed, lane)
    proof = lowest((-lower[0], -lower[1]), dual, lane)
    level = of_lane(lower, lane, proof)
    p = ()
    size = scale * 0.0
    for o in tl.static_range(M):
        x = of_lane(ps[o], lane, best)
        p = p + (where(x[0] < NOTHING, exact(x[0] * 0.0), x),)
        size += x[0] * norms[o]
    # The objectives that may carry weight, as the bits of a face.
    rounding = tl.sum(tl.where(lane == proof, slack, 0.0)) * 16.0 * M * EPS
    face = 0
    count = 0
    for o in tl.static_range(M):
        above = subtract(of_lane(ys[o], lane, proof), level)
        member = (p[o][0] > 0.0) | (above[0] <= rounding * (norms[o] + size))
        face += tl.where(member, 2**o, 0)
        count += tl.where(member, 1, 0)
    k = tl.sum(tl.where(lane == face, found[10], 0))
    i = tl.sum(tl.where(lane == face, found[11], 0))
    j = tl.sum(tl.where(lane == face, found[12], 0))
    null = scale * 0.0 + 1.0
    null = null * (NOISE if M == 2 else EPS * 8.0 * M)
    D11, ratio = of_lane(found[7], lane, face), of_lane(found[8], lane, face)
    pivot = of_lane(found[9], lane, face)
    d, same = _null_direction(D11, ratio, pivot, k, i, j, count, norms, null, M)
    low, high = scale * 0.0 - float("inf"), scale * 0.0 + float("inf")
    if M == 3:
        # f* = 0 on a ray through 0: every shorter Gp along it is as good, as long as b'p <= 0.
        on_ray = (tl.sum(tl.where((lane == 7) & found[6] & ~found[5], 1, 0)) == 1) & linear_term
        on_ray = on_ray & (tl.abs(level[0]) <= rounding * size) & (face == 7) & ~same
        length = scale * 0.0
        for o in tl.static_range(M):
            length += tl.abs(d[o][0])
        on_ray = on_ray & (length == 0.0)
        ray = ()
        for o in tl.static_range(M):
            ray = ray + (where(on_ray, of_lane(vs[o], lane, 7), d[o]),)
        d = ray
        slope, now = dot(b, d, M)[0], dot(b, p, M)[0]
        bound = -now / tl.where(slope == 0.0, 1.0, slope)
        high = tl.where(on_ray & (slope > 0.0), bound, high)
        low = tl.where(on_ray & (slope < 0.0), bound, low)
    moved = _project(p, d, w, low, high, M)
    rounded, before = (), ()
    for o in tl.static_range(M):
        moved_or_w = where(same, w[o], moved[o])
        rounded, before = rounded + (moved_or_w,), before + (p[o][0],)
    after = ()
    for o in tl.static_range(M):
        after = after + (rounded[o][0],)
    cost = subtract(value_of(A, b, s, after, M), value_of(A, b, s, before, M))
    free = cost[0] <= 1e-12 * scale * size  # which directions are null is a matter of rounding
    chosen = ()
    for o in tl.static_range(M):
        chosen = chosen + (where(free, rounded[o], p[o]),)
    return chosen, level


@triton.jit
def linear_program(b, norms, scale, magnitude, w, M: tl.constexpr):
    """s = 0: the optimal face is {b_i = min b}; w moves onto it by one shift."""
    least = b[0]
    for i in tl.static_range(1, M):
        least = where(b[i][0] < least[0], b[i], least)
    rounding = tl.minimum(magnitude * EPS * 8.0 * M, 1e-12 * scale)
    missing = exact(scale * 0.0 + 1.0)
    count = scale * 0.0
    for i in tl.static_range(M):
        member = subtract(b[i], least)[0] <= rounding * norms[i]
        missing = where(member, subtract(missing, w[i]), missing)
        count += tl.where(member, 1.0, 0.0)
    share = divide(missing, exact(count))
    p = ()
    for i in tl.static_range(M):
        member = subtract(b[i], least)[0] <= rounding * norms[i]
        p = p + (where(member, add(w[i], share), exact(scale * 0.0)),)
    return p, least
