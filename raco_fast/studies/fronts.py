"""Sets of points of which more is better in every coordinate: domination, fronts, indicators.

Points are float64 arrays [n, m], one row a point. What is to be small is negated before.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def dominates(a: Points, b: Points) -> NDArray[np.bool_]:
    """Whether points a [..., m] are nowhere below points b [..., m] and somewhere above."""
    return np.asarray((a >= b).all(axis=-1) & (a > b).any(axis=-1))


def front(points: Points) -> NDArray[np.bool_]:
    """[n] whether a point is dominated by no other one; equal points are all on the front."""
    return np.asarray(~dominates(points[:, None], points[None, :]).any(axis=0))


def epsilon_additive(a: Points, b: Points) -> float:
    """The least number that, added to all coordinates of `a`, leaves no point of `b` above it.

    Negative where `a` is better by so much everywhere; not symmetric.

    Source: Zitzler et al., IEEE Trans. Evol. Comput. 7 (2003), I_ε+.
    """
    return float((b[None, :] - a[:, None]).max(axis=-1).min(axis=0).max())


def ray_distance(point: Points, reference: Points, weights: Points) -> float:
    """How far a point lies beside the ray from the reference point along the weights, all [m].

    Source: d2 of penalty boundary intersection; Zhang and Li, IEEE Trans. Evol. Comput. 11 (2007).
    """
    gain, ray = point - reference, weights / np.linalg.norm(weights)
    return float(np.linalg.norm(gain - (gain @ ray) * ray))


def hypervolume(points: Points, reference: Points) -> float:
    """The volume that points dominate above a reference point [m]; exact.

    By moocore where it is installed, which is faster for hundreds of points, else by
    `volume_of_boxes`. A point that is not above the reference point in every coordinate adds
    nothing.
    """
    if find_spec("moocore") is None:
        sides = points - reference
        return volume_of_boxes(sides[(sides > 0).all(axis=1)])
    import moocore

    return float(moocore.hypervolume(points, ref=reference, maximise=True))


def volume_of_boxes(sides: Points) -> float:
    """The volume of a union of boxes that have a corner in common.

    Each box counts without what the boxes after it share with it. They are sorted by their first
    side, so that all of these shares are equally long there: each level of the recursion has a
    dimension less, and leaves out the shares that lie within others.

    Args:
        sides: [n, m] their lengths, positive.
    Source: While, Bradstreet and Barone, IEEE Trans. Evol. Comput. 16 (2012).
    """
    if not len(sides):
        return 0.0
    boxes = np.unique(sides[front(sides)], axis=0)
    return sum(
        float(box.prod()) - volume_of_boxes(np.minimum(boxes[i:], box))
        for i, box in enumerate(boxes, start=1)
    )
