"""Sets of points of which more is better in every coordinate: domination, fronts, indicators.

Points are float64 arrays [n, m], one row a point. What is to be small is negated before.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

NO_HYPERVOLUME = (
    "Hypervolumes are left out because moocore is not installed: pip install 'raco-fast[sweep]'"
)


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


def has_hypervolume() -> bool:
    """Whether moocore is installed."""
    return find_spec("moocore") is not None


def hypervolume(points: Points, reference: Points) -> float:
    """The volume that points dominate above a reference point [m]; exact, by moocore.

    A point that is not above the reference point in every coordinate adds nothing.
    """
    import moocore

    return float(moocore.hypervolume(points, ref=reference, maximise=True))
