"""Domination, fronts and indicators against loops and formulas of their own."""

import math
import sys
from itertools import combinations

import numpy as np
import pytest

from raco_fast.studies import fronts
from raco_fast.studies.fronts import (
    dominates,
    epsilon_additive,
    front,
    hypervolume,
    ray_distance,
    volume_of_boxes,
)

NO_MOOCORE = "moocore is not installed (extra `sweep`)"
CASES = [(m, n) for m in (2, 3, 4, 6) for n in (1, 2, 5, 9)]


def draw(m: int, n: int) -> np.ndarray:
    """With equal coordinates and equal points among them."""
    points = np.random.default_rng(10 * m + n).random((n, m))
    points[-1, 0] = points[0, 0]
    return np.round(np.concatenate([points, points[:1]]), 2)


def above(a, b) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(
        x > y for x, y in zip(a, b, strict=True)
    )


def volume(points, reference) -> float:
    """By inclusion and exclusion of the boxes, in exact products of float64."""
    boxes = [p for p in points.tolist() if all(x > r for x, r in zip(p, reference, strict=True))]
    total = 0.0
    for k in range(1, len(boxes) + 1):
        for some in combinations(boxes, k):
            corner = [min(column) for column in zip(*some, strict=True)]
            sides = [x - r for x, r in zip(corner, reference, strict=True)]
            total -= (-1) ** k * math.prod(sides)
    return total


@pytest.mark.parametrize(("m", "n"), CASES)
def test_domination_and_fronts_are_those_of_the_definition(m, n):
    points = draw(m, n)
    for a in points:
        for b in points:
            assert bool(dominates(a, b)) == above(a, b)
    assert front(points).tolist() == [not any(above(b, a) for b in points) for a in points]


@pytest.mark.parametrize(("m", "n"), CASES)
def test_the_indicator_is_that_of_the_definition(m, n):
    a, b = draw(m, n), draw(m, n + 1)
    expected = max(min(max(y - x for x, y in zip(p, q, strict=True)) for p in a) for q in b)
    assert epsilon_additive(a, b) == expected
    assert epsilon_additive(a, a) == 0.0
    assert epsilon_additive(b + 0.25, b) == pytest.approx(-0.25, rel=1e-12)


def test_the_distance_from_a_ray_is_what_pythagoras_leaves():
    weights, reference = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.2, -0.3])
    on_it = ray_distance(reference + 2.5 * weights, reference, weights)
    assert on_it == pytest.approx(0, abs=1e-15)
    point = np.array([0.7, 0.4, 0.5])
    gain = point - reference
    along = gain @ weights / math.sqrt(weights @ weights)
    expected = math.sqrt(gain @ gain - along**2)
    assert ray_distance(point, reference, weights) == pytest.approx(expected, rel=1e-12)
    assert ray_distance(point, reference, 7 * weights) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("with_moocore", [False, True])
@pytest.mark.parametrize(("m", "n"), CASES)
def test_hypervolume_is_that_of_the_boxes(m, n, with_moocore, monkeypatch):
    if with_moocore:
        pytest.importorskip("moocore", reason=NO_MOOCORE)
    else:
        monkeypatch.setitem(sys.modules, "moocore", None)  # importing it would raise
        monkeypatch.setattr(fronts, "find_spec", lambda name: None)
    for points, least in ((draw(m, n), 0.2), (-draw(m, n), -1.0)):
        reference = np.full(m, least)
        assert hypervolume(points, reference) == pytest.approx(volume(points, reference), abs=1e-12)


def test_no_points_have_no_volume(monkeypatch):
    monkeypatch.setattr(fronts, "find_spec", lambda name: None)
    assert hypervolume(np.array([[0.2, 0.9], [0.9, 0.1]]), np.array([0.2, 0.1])) == 0.0


@pytest.mark.parametrize(("m", "n"), [(2, 60), (3, 60), (4, 30), (6, 15)])
def test_the_volume_of_large_fronts_is_that_of_moocore(m, n):
    moocore = pytest.importorskip("moocore", reason=NO_MOOCORE)
    points = np.abs(np.random.default_rng(m).normal(size=(n, m)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)  # none dominates another one
    expected = moocore.hypervolume(points, ref=np.zeros(m), maximise=True)
    assert volume_of_boxes(points) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("m", "n"), CASES)
def test_the_indicator_is_that_of_moocore(m, n):
    moocore = pytest.importorskip("moocore", reason=NO_MOOCORE)
    a, b = draw(m, n), draw(m, n + 1)
    expected = moocore.epsilon_additive(a, ref=b, maximise=True)
    assert epsilon_additive(a, b) == pytest.approx(float(expected), abs=1e-12)
    kept = moocore.is_nondominated(a, maximise=True, keep_weakly=True)
    assert front(a).tolist() == kept.tolist()
