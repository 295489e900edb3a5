import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raco_fast.report import markdown_table, share_with_interval, wilson_interval


# Newcombe, Statistics in Medicine 17 (1998), Table I, method 3: published to four places.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_against_published_intervals(successes, n, low, high):
    assert wilson_interval(successes / n, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(0, 500), st.integers(1, 500), st.floats(0.5, 0.999))
def test_its_ends_are_where_the_score_test_rejects(successes, n, confidence):
    share = min(successes, n) / n
    low, high = wilson_interval(share, n, confidence)
    assert 0 <= low <= share <= high <= 1
    z = abs(share - low) / math.sqrt(low * (1 - low) / n) if 0 < low < share else None
    if z is not None:
        assert math.erf(z / math.sqrt(2)) == pytest.approx(confidence, rel=1e-6)
    mirrored = wilson_interval(1 - share, n, confidence)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_half_counts_of_ties_are_allowed():
    low, high = wilson_interval(10.5 / 21, 21)
    assert low == pytest.approx(1 - high)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0), "`n` must be at least 1, got 0"),
        ((1.5, 10), r"`share` must be in \[0, 1\]"),
        ((math.nan, 10), r"`share` must be in \[0, 1\]"),
        ((0.5, 10, 1.0), r"`confidence` in \(0, 1\)"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(*arguments)


def test_a_share_is_shown_with_its_interval() -> None:
    low, high = wilson_interval(0.625, 40)
    assert share_with_interval(0.625, 40) == f"62.5% ({low:.1%} to {high:.1%})"
    assert share_with_interval(None, 40) == "-"


def test_a_table_has_a_rule_under_its_titles() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
