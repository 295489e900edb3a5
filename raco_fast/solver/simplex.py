"""The closest point of the simplex, exactly."""

import numpy as np

from raco_fast.solver.rule import Array


def projected(x: Array) -> Array:
    """argmin over the simplex of ‖y - x‖, for x [m]; NaN where x is not finite.

    y = max(x - θ, 0), where θ is what makes the k largest sum to 1, and k the most that stay
    positive with their own θ.  Source: Held, Wolfe and Crowder, Mathematical Programming 6, 1974.
    """
    x = x - x.max()  # a common part changes nothing, and its rounding would
    falling = np.sort(x)[::-1]
    thresholds = (np.cumsum(falling) - 1.0) / np.arange(1.0, len(x) + 1.0)
    k = max(int(np.count_nonzero(falling > thresholds)), 1)
    found: Array = np.maximum(x - thresholds[k - 1], 0.0)
    return found
