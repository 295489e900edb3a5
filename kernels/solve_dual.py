"""The dual problem of m <= 3 objectives on the device, so that no step has to wait for the host.

    p             = argmin over the simplex of f(p) = b'p + s √(p'Mp),  b = Mw, s = c ‖g0‖
    p_clipped     = min(p, w), never renormalised
    coefficients  = w + (s / ‖G p_clipped‖) p_clipped              arXiv 2602.02495, Algorithm 1

One program, a few thousand instructions, once per step. A simplex of 3 objectives has 7 faces, and
all of them are solved at once (dual_faces.py): no iteration, no branch, no tolerance on f. The face
with the lowest f has the minimiser; another one, with the largest lower bound of f, may have the
certificate. Of several minimisers the one closest to w is returned (dual_minimise.py).

Same rules and properties as the C++ solver (csrc/), by other orders of operations: the two agree to
rounding. Arithmetic is in pairs of float64 (double_double.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .double_double import add, divide, exact, multiply, product, root, subtract, where
from .dual_faces import EPS
from .dual_minimise import linear_program, minimise, norm_or_zero, value_of
from .tables import current

MAX_OBJECTIVES = 3
RULES = ("linear", "cagrad", "cagrad-clip", "mgda")
SCALARS = 10
"""Numbers behind p, p_clipped and coefficients in a packed row; csrc/solver/dual.hpp names them."""


@dataclass(frozen=True)
class Outputs:
    """Where `solve_dual` writes, on the device.

    `packed` [3m + SCALARS] float64: p, p_clipped, coefficients and the scalars of
    csrc/solver/dual.hpp; `used` [m, m] float64: the Gram that was solved (unscaled, NaN under
    found_inf); `step` [m + 2] float32: alpha, clip factor, and 1 where the step runs, 0 where it is
    skipped; `skipped` [1] int64: counts the skipped steps.
    """

    packed: Tensor
    used: Tensor
    step: Tensor
    skipped: Tensor


SCALARS_COUNT = tl.constexpr(SCALARS)


@triton.jit
def _power_of_two(e):
    """2^e in float64."""
    return ((e + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _normalised(gram, scale, found_inf, M: tl.constexpr):
    """Gram / scale² times 4^-e, within Cauchy and Schwarz, as a tuple; e; what it was; finite?"""
    raw = ()
    zero = tl.load(gram) * 0.0
    largest = zero
    for i in tl.static_range(M * M):
        x = tl.load(gram + i) / (scale * scale)
        x = tl.where(found_inf > 0.0, float("nan"), x)
        zero += x * 0.0
        raw = raw + (x,)
    finite = zero == 0.0
    for i in tl.static_range(M):
        largest = tl.maximum(largest, tl.where(finite, raw[i * (M + 1)], 0.0))
    # frexp's exponent, halved; two factors, since 4^-e alone overflows for the smallest Grams.
    e = ((largest.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1022) >> 1
    down = _power_of_two(-e)
    A, kept = (), ()
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            x = raw[i * M + j]
            if i != j:
                bound = tl.sqrt(raw[i * (M + 1)]) * tl.sqrt(raw[j * (M + 1)])
                x = tl.where(finite, tl.minimum(tl.maximum(x, -bound), bound), x)
            kept = kept + (x,)
            A = A + (tl.where(finite, x, 0.0) * down * down,)
    return A, _power_of_two(e), kept, finite


@triton.jit
def _changes_direction(p, clipped, M: tl.constexpr):
    """Clipping acts where p_clipped is no multiple of p."""
    smallest, largest = p[0] * 0.0 + 1.0, p[0] * 0.0
    for i in tl.static_range(M):
        ratio = clipped[i] / tl.where(p[i] == 0.0, 1.0, p[i])
        smallest = tl.where(p[i] == 0.0, smallest, tl.minimum(smallest, ratio))
        largest = tl.where(p[i] == 0.0, largest, tl.maximum(largest, ratio))
    return largest - smallest > 1e-12 * largest


@triton.jit
def solve_dual_step(
    gram,
    problem,
    grad_scale,
    found_inf,
    packed,
    used,
    step,
    skipped,
    M: tl.constexpr,
    RULE: tl.constexpr,
):
    """`problem`: w [M], c, limit of the norm. `step`: alpha [M], clip, 1 or 0 = runs or is skipped.
    `packed`, `used`: what a host reads when it wants to know (`used` [M, M]: the Gram solved).
    """
    scale = tl.load(grad_scale).to(tl.float64)
    A, unit, kept, finite = _normalised(gram, scale, tl.load(found_inf), M)
    c, limit = tl.load(problem + M), tl.load(problem + M + 1)
    w, norms, wide = (), (), ()
    total = exact(c * 0.0)
    magnitude = c * 0.0
    for i in tl.static_range(M):
        w = w + (tl.load(problem + i),)
        norms = norms + (tl.sqrt(A[i * (M + 1)]),)
        magnitude += w[i] * norms[i]
        total = add(total, exact(w[i]))
    for i in tl.static_range(M):
        wide = wide + (divide(exact(w[i]), total),)
    g0 = norm_or_zero(A, w, M)
    one, zero = exact(c * 0.0 + 1.0), exact(c * 0.0)
    s = one
    size = one[0]
    if RULE != "mgda":
        s = multiply(exact(c), g0)
        size = g0[0]
    b = ()
    for i in tl.static_range(M):
        x = zero
        if RULE != "mgda":
            for j in tl.static_range(M):
                x = add(x, product(A[i * M + j], w[j]))
        b = b + (x,)

    exact_p, lower = wide, zero
    trivial = True
    if RULE != "linear":
        trivial = g0[0] == 0.0
        of_s, bound = minimise(A, b, s, size, RULE != "mgda", wide, M)
        of_b, least = linear_program(b, norms, size, magnitude, wide, M)
        lower = where(s[0] > 0.0, bound, least)
        exact_p = ()
        for i in tl.static_range(M):
            x = where(s[0] > 0.0, of_s[i], of_b[i])
            exact_p = exact_p + (where(trivial, wide[i], x),)

    p, clipped = (), ()
    clips = c < 0.0
    for i in tl.static_range(M):
        x = multiply(exact_p[i], total)[0]
        x = tl.where(tl.abs(x - w[i]) <= w[i] * EPS * 4.0, w[i], x)
        p = p + (x,)
        y = tl.minimum(x, w[i]) if RULE == "cagrad-clip" else x
        clipped = clipped + (y,)
        clips = clips | (x != y)
    value = value_of(A, b, s, p, M)
    gp = norm_or_zero(A, clipped, M)
    corrects = gp[0] > 0.0
    if RULE == "linear":
        corrects = c < 0.0
    factor = where(corrects, divide(s, where(corrects, gp, one)), zero)
    cross = zero
    for i in tl.static_range(M):
        cross = add(cross, multiply(b[i], exact(clipped[i])))
    twice = (2.0 * factor[0], 2.0 * factor[1])
    square = add(multiply(g0, g0), multiply(twice, cross))
    update = root(add(square, where(corrects, multiply(s, s), zero)))
    if RULE == "mgda":
        update = gp

    nan = float("nan")
    for i in tl.static_range(M):
        alpha = clipped[i]
        if RULE != "mgda":
            alpha = add(exact(w[i]), multiply(exact(clipped[i]), factor))[0]
        alpha = tl.where(finite, alpha, nan)
        tl.store(packed + i, tl.where(finite, p[i], nan))
        tl.store(packed + M + i, tl.where(finite, clipped[i], nan))
        tl.store(packed + 2 * M + i, alpha)
        tl.store(step + i, alpha.to(tl.float32))
    for i in tl.static_range(M * M):
        tl.store(used + i, kept[i])
    norm = update[0] * unit
    clip = tl.where(limit < norm + 1e-6, limit / (norm + 1e-6), 1.0)
    tl.store(step + M, tl.where(finite, clip, nan).to(tl.float32))
    tl.store(step + M + 1, tl.where(finite, 1.0, 0.0))
    tl.store(skipped, tl.load(skipped) + tl.where(finite, 0, 1))
    of_f = unit if RULE == "mgda" else unit * unit
    gap = tl.where(trivial, 0.0, tl.maximum(subtract(value, multiply(total, lower))[0], 0.0))
    row = packed + 3 * M
    tl.store(row, tl.where(finite, gap * of_f, nan))
    tl.store(row + 1, tl.where(finite, value[0] * of_f, nan))
    tl.store(row + 2, tl.where(finite, g0[0] * unit, nan))
    tl.store(row + 3, tl.where(finite, gp[0] * unit, nan))
    tl.store(row + 4, tl.where(finite, norm, nan))
    active = finite & clips & _changes_direction(p, clipped, M)
    tl.store(row + 5, tl.where(active, 1.0, 0.0))
    tl.store(row + 6, tl.where(finite, 0.0, 1.0))
    for i in tl.static_range(7, SCALARS_COUNT):
        tl.store(row + i, 0.0)


def solve_dual(
    gram: Tensor,
    problem: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    out: Outputs,
    rule: str,
) -> None:
    """Solve the dual problem of one Gram matrix; nothing waits for the device.

    Args:
        gram: [m, m] float64, m <= 3, exactly symmetric, of gradients times `grad_scale`.
        problem: [m + 2] float64: the weights, c, and the limit on ‖G0‖ (infinity for none).
        grad_scale, found_inf: one float32 each; a nonzero `found_inf`, like a Gram that is not
            finite, makes alpha and clip NaN, with which the update kernels write nothing.
        out: what is written.
        rule: one of `RULES`.
    """
    with current(gram.device):
        solve_dual_step[(1,)](
            gram,
            problem,
            grad_scale,
            found_inf,
            out.packed,
            out.used,
            out.step,
            out.skipped,
            M=len(gram),
            RULE=rule,
            num_warps=1,
            enable_fp_fusion=False,
        )
