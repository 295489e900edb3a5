"""Numbers of about 32 digits in Triton: (hi, lo), the unevaluated sum of two float64.

Why: ‖Gp‖ = √(p'Mp), and where gradients cancel p'Mp is a small difference of large terms. In
float64 it would be known to √2^-53 = 1e-8 only. Knuth's two-sum, and the product's error by a fused
multiply-add. A kernel that uses this must be launched with enable_fp_fusion=False: a contraction
in the error terms would change what they are the error of.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exact(x):
    """A float64 as a double-double."""
    return (x, x * 0.0)


@triton.jit
def _renormalised(a, b):
    """(hi, lo) from |a| >= |b|."""
    s = a + b
    return (s, b - (s - a))


@triton.jit
def product(a, b):
    """a b of two float64, to the last bit."""
    p = a * b
    return (p, tl.fma(a, b, -p))


@triton.jit
def add(a, b):
    """a + b."""
    s = a[0] + b[0]
    t = s - a[0]
    return _renormalised(s, ((a[0] - (s - t)) + (b[0] - t)) + (a[1] + b[1]))


@triton.jit
def subtract(a, b):
    """a - b."""
    return add(a, (-b[0], -b[1]))


@triton.jit
def multiply(a, b):
    """a b."""
    p = product(a[0], b[0])
    return _renormalised(p[0], p[1] + (a[0] * b[1] + a[1] * b[0]))


@triton.jit
def divide(a, b):
    """a / b."""
    q = a[0] / b[0]
    r = subtract(a, multiply(exact(q), b))
    return _renormalised(q, r[0] / b[0])


@triton.jit
def root(a):
    """√a, 0 where rounding made a negative."""
    x = tl.sqrt(tl.maximum(a[0], 0.0))
    r = subtract(a, product(x, x))
    correction = tl.where(x > 0.0, r[0] / (2.0 * x), 0.0)
    return _renormalised(x, correction)


@triton.jit
def where(condition, a, b):
    """a where the condition holds, else b."""
    return (tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1]))
