"""Probabilities as labels and weights of pairs, from a file to a batch."""

import json

import pytest
from pair_files import read_pairs

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.label_columns import LabelColumn
from raco_fast.dpo.data.sources import read_sources

PLAIN = {"prompt": [{"role": "user", "content": "why?"}], "response_a": "so", "response_b": "no"}


@pytest.fixture
def write(tmp_path):
    def write(*rows: dict) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(PLAIN | row) + "\n" for row in rows))
        return str(file)

    return write


def test_a_probability_is_the_likelier_label_times_how_likely_it_is(write):
    values = (0.75, 0.25, 0.5, 1, 0.0)
    rows = [{"preferences": {"y": -1}, "preference_probabilities": {"x": q}} for q in values]
    pairs = read_pairs(write(*rows), ["x", "y"])
    labels = [pair.preferences["x"] for pair in pairs]
    assert labels == [0.75, -0.75, 0.5, 1, -1]
    assert [type(label) for label in labels] == [float, float, float, int, int]
    assert all(pair.preferences["y"] == -1 for pair in pairs)


def test_a_field_of_which_the_lower_is_preferred_turns_a_probability(write):
    row = {"preferences": {}, "preference_probabilities": {"long": 0.75}, "pair_weights": 2}
    source = DataSource(write(row), objectives={"x": LabelColumn("long", "lower")})
    (pair,) = read_sources([source], ["x"])
    assert pair.preferences == {"x": -0.75}
    assert pair.pair_weights == {"x": 2.0}


def test_null_is_not_labelled(write):
    """Tables have every objective in every row, with null where there is nothing."""
    file = write(
        {"preferences": {"x": None, "y": 1}, "preference_probabilities": {"x": 0.75, "y": None}},
        {"preferences": {"x": None, "y": None}, "preference_probabilities": {"x": None}},
        {"preferences": {"x": 1, "y": -1}, "preference_probabilities": None},
        {"preferences": {"y": 1}, "preference_probabilities": {"x": None}},
    )
    labels = [tuple(pair.preferences.values()) for pair in read_pairs(file, ["x", "y"])]
    assert labels == [(0.75, 1), (0, 0), (1, -1), (0, 1)]


SOFT = {0: 0.5, 1: 0.75, 2.5: 0.9, 3: 1}


@pytest.mark.parametrize(
    ("grade", "label"),
    [(0, 0.5), (0.5, 0.5), (1, 0.75), (-2, -0.75), (2.5, 0.9), (-2.9, -0.9), (3, 1), (-7, -1)],
)
def test_grades_become_probabilities_by_a_table(grade, label):
    assert LabelColumn("x", soft=SOFT).label(grade) == (0.5 if abs(grade) < 1 else label)
    turned = LabelColumn("x", "lower", SOFT).label(grade)
    assert turned == (0.5 if abs(grade) < 1 else -label)
    assert type(LabelColumn("x", soft=SOFT).label(3)) is int


def test_a_grade_below_the_table_is_no_label():
    column = LabelColumn("x", soft={"1": 0.75, "2": 1.0})  # keys as JSON has them
    assert [column.label(grade) for grade in (0, 0.9, -1, 2)] == [0, 0, -0.75, 1]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"column": " "}, "`column` must name a field, got ' '"),
        ({"prefer": "less"}, r"`prefer` must be one of \['higher', 'lower'\], got 'less'"),
        ({"soft": {}}, r"`soft` must map least differences to probabilities in \[0.5, 1\]"),
        ({"soft": {1: 0.4}}, r"in \[0.5, 1\] that do not fall, got \{1: 0.4\}; write e.g."),
        ({"soft": {1: 0.9, 2: 0.8}}, "that do not fall"),
        ({"soft": {-1: 0.9}}, "`soft` must map differences of at least 0, and 0 to 0.5 if at all"),
        ({"soft": {0: 0.9}}, "a difference of 0 prefers neither response"),
        ({"soft": {"one": 0.9}}, "`soft` must map numbers to probabilities, got {'one': 0.9}"),
    ],
)
def test_columns_that_are_none(fields, match):
    with pytest.raises(ValueError, match=match):
        LabelColumn(**{"column": "x"} | fields)


def test_a_chosen_response_may_be_chosen_with_a_probability(tmp_path):
    file = tmp_path / "chosen.jsonl"
    row = {
        "prompt": "why?",
        "chosen": "so",
        "rejected": "no",
        "preference_probabilities": {"x": 0.9},
    }
    file.write_text(json.dumps(row))
    (pair,) = read_pairs(file, ["x"])
    assert pair.preferences == {"x": 0.9}
    with pytest.raises(ValueError, match="`preference_probabilities` must hold 'y', got another"):
        read_pairs(file, ["y"])


def test_weights_are_one_number_or_one_an_objective(write):
    preferences = {"x": 1, "y": -1, "z": 0}
    file = write(
        {"preferences": preferences, "pair_weights": 0.5},
        {"preferences": preferences, "pair_weights": {"x": 3, "y": 1}},
        {"preferences": preferences},
    )
    weights = [pair.pair_weights for pair in read_pairs(file, ["x", "y", "z"])]
    assert weights == [{"x": 0.5, "y": 0.5}, {"x": 3.0}, {}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"preference_probabilities": {"x": 1.5}},
            r"`preference_probabilities.x` must be in \[0, 1\]",
        ),
        (
            {"preference_probabilities": {"x": True}},
            r"must be in \[0, 1\], got True; it is the prob",
        ),
        ({"preference_probabilities": 0.7}, "must map objectives to probabilities, got float"),
        ({"preference_probabilities": {"y": 0.7}}, "got no field for 'x'"),
        (
            {"preferences": {"x": 0}, "preference_probabilities": {"x": 0.5}},
            "without a hard label, got the label 0 beside it; remove one",
        ),
        ({"preferences": {"x": 1}, "pair_weights": 0}, "`pair_weights` must be a positive number"),
        ({"preferences": {"x": 1}, "pair_weights": {"X": 2}}, "`pair_weights.x` must .*, got None"),
        ({"preferences": {"x": 1}, "pair_weights": {"x": 1e999}}, "got inf; write 1 for a plain"),
    ],
)
def test_errors_name_the_line_and_the_cure(write, fields, message):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: .*{message}"):
        read_pairs(write({"preferences": {}} | fields), ["x"])


def test_a_row_of_one_response_has_no_probability_and_no_weight(tmp_path):
    rows = [
        {"prompt": "why?", "response": r, "helpfulness": k, "pair_weights": 2}
        for k, r in enumerate(("so", "no"))
    ]
    file = tmp_path / "rated.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="`pair_weights` must stand in a row that is a pair"):
        read_pairs(file, ["helpfulness"])
