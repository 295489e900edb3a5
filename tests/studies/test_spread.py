"""Mean, deviation and Student's interval over seeds."""

import math

import pytest

from raco_fast.studies.spread import Spread


def test_spread_is_the_mean_the_deviation_and_students_interval() -> None:
    spread = Spread((0.1, 0.4, 0.7))
    assert spread.mean == pytest.approx(0.4)
    assert spread.deviation == pytest.approx(0.3)
    assert spread.interval() == pytest.approx(4.303 * 0.3 / math.sqrt(3))
    assert not spread.is_clear()
    assert Spread((0.39, 0.4, 0.41)).is_clear()
    assert not Spread((-0.1, 0.0, 0.1)).is_clear()
    assert (spread - Spread((0.0, 0.1, 0.4))).values == pytest.approx((0.1, 0.3, 0.3))
    assert spread.with_interval() == "0.4000 ± 0.7453"


def test_one_seed_has_no_interval() -> None:
    assert Spread((0.9,)).deviation == 0.0
    assert math.isinf(Spread((0.9,)).interval())
    assert not Spread((0.9,)).is_clear()
    assert Spread((0.9,)).with_interval() == "0.9000"
