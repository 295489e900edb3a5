"""Intervals from leaving out blocks: coverage, signs, and ratios with a noisy denominator."""

import math

import numpy as np
import pytest

from raco_fast.solver.intervals import BLOCKS, Interval, interval, ratio_interval


def means_without_a_block(x: np.ndarray) -> np.ndarray:
    """[BLOCKS, ...] of samples x [BLOCKS, ...]."""
    return (x.sum(0) - x) / (BLOCKS - 1)


def test_of_a_mean_it_is_students():
    x = np.random.default_rng(0).standard_normal(BLOCKS) + 0.3
    found = interval(x.mean(), means_without_a_block(x))
    half = 2.093 * x.std(ddof=1) / math.sqrt(BLOCKS)
    assert found == pytest.approx((x.mean(), x.mean() - half, x.mean() + half), rel=1e-4)


def test_a_ratio_is_covered_in_95_of_100_cases_where_its_denominator_is_noisy():
    draw = np.random.default_rng(1)
    truth, covered, endless, n = -0.6, 0, 0, 2000
    for _ in range(n):
        noise = draw.standard_normal((BLOCKS, 2)) * 1.6
        x = np.array([truth, 1.0]) + noise @ np.array([[1.0, 0.3], [0.0, 0.8]])
        (top, bottom), left_out = x.mean(0), means_without_a_block(x)
        found = ratio_interval(top, bottom, *left_out.T)
        covered += found.low <= truth <= found.high
        endless += math.isinf(found.low)
        assert found.sign == interval(top, left_out[:, 0]).sign
    assert 0.935 < covered / n < 0.97
    assert endless > 20  # the denominator was noisy enough to be no toy


def test_bounds_hold_and_what_does_not_exist_has_no_end():
    steady = np.ones(BLOCKS) + 1e-3 * np.random.default_rng(2).standard_normal(BLOCKS)
    assert ratio_interval(2.0, 1.0, 2 * steady, steady, (-1.0, 1.0))[1:] == (1.0, 1.0)
    missing = np.where(np.arange(BLOCKS) == 3, np.nan, steady)
    assert interval(1.0, missing) == Interval(1.0, -math.inf, math.inf)
    assert ratio_interval(1.0, 1.0, missing, steady, (-1.0, 1.0))[1:] == (-1.0, 1.0)
    none = ratio_interval(1.0, -0.1, steady, -0.1 * steady, (0.0, math.inf))
    assert math.isnan(none.value)
    assert Interval(1.0, 0.5, 1.5).sign == 1
    assert Interval(-1.0, -1.5, -0.5).sign == -1
    assert Interval(1.0, -0.5, 2.5).sign == 0
