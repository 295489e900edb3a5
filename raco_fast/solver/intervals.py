"""95 % intervals of what is computed from sums over pairs, by leaving out one block at a time.

The delete-a-block jackknife: pairs are dealt at random into K blocks of like size, and a statistic
is computed K more times, each without one block. Its variance is about

    (K - 1)/K Σ_k (θ_k - mean θ)²

and Student's t of K - 1 degrees of freedom makes an interval of it. It takes no formula of its own
for any statistic, and holds for smooth ones: not for the place of a corner.
Source: Efron and Stein, Ann. Stat. 9 (1981); Fieller, J. R. Stat. Soc. B 16 (1954).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BLOCKS = 20
_T = 2.0930240544  # Student's t of 19 degrees of freedom, 97.5 %


class Interval(NamedTuple):
    """A value and its 95 % interval; NaN and infinite where there is none."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval has one sign, 0 where both."""
        return int(self.low > 0.0) - int(self.high < 0.0)


def _covariance(a: Array, b: Array) -> float:
    """Of two statistics, from their [BLOCKS] values without one block each."""
    assert len(a) == len(b) == BLOCKS, "the quantile is that of so many blocks"
    return float((BLOCKS - 1) / BLOCKS * ((a - a.mean()) * (b - b.mean())).sum())


def interval(value: float, left_out: Array) -> Interval:
    """Of a statistic, from its values without one block each.

    Args:
        value: with all blocks.
        left_out: [BLOCKS]; one that is not finite leaves no interval.
    """
    if not (np.isfinite(value) and np.isfinite(left_out).all()):
        return Interval(float(value), -np.inf, np.inf)
    half = _T * np.sqrt(_covariance(left_out, left_out))
    return Interval(float(value), float(value - half), float(value + half))


def ratio_interval(
    top: float,
    bottom: float,
    tops: Array,
    bottoms: Array,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """Of top / bottom, where the bottom is known to be positive and its estimate is noisy.

    Fieller's: the ratios ρ for which top - ρ bottom is not distinguishable from 0. It has one sign
    exactly where the interval of `top` has, and no end where that of `bottom` reaches 0.

    Args:
        tops, bottoms: [BLOCKS], without one block each.
        bounds: between which the ratio is known to lie.
    """
    of_top = interval(top, tops)
    value = top / bottom if bottom > 0.0 else np.nan
    if not (np.isfinite(of_top.low) and np.isfinite(bottoms).all() and np.isfinite(bottom)):
        return Interval(value, *bounds)
    t2 = _T**2
    a = bottom**2 - t2 * _covariance(bottoms, bottoms)
    b = top * bottom - t2 * _covariance(tops, bottoms)
    c = top**2 - t2 * _covariance(tops, tops)
    root = np.sqrt(max(b * b - a * c, 0.0))
    low, high = bounds
    if bottom > 0.0 and a > 0.0:  # between the roots of a ρ² - 2 b ρ + c
        low, high = (b - root) / a, (b + root) / a
    elif of_top.sign and a < 0.0:  # outside of them, and of the sign of the top
        roots = sorted(((b - root) / a, (b + root) / a))
        low, high = (max(roots[1], 0.0), high) if of_top.sign > 0 else (low, min(roots[0], 0.0))
    return Interval(value, *(float(np.clip(end, *bounds)) for end in (low, high)))
